"""Beginning with a checkpoint's parameters: as a classifier, or going on with pre-training, also with a new
attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.models.initial import add_gate, first_value, shapes
from qtx_ref.presets import attention
from qtx_ref.spec import Family, Gate, Head, ModelSpec, SpecError

from .. import hub
from ..data import DataSpec
from ..data.splits import SHORT, refuse_overlap
from ..engines.protocols import Data
from ..files.checkpoint import Checkpoint, file_of, load_checkpoint
from ..files.container import FileError, sha_of
from ..runs.reading import RunSpec
from .opening import open_data
from .resolving import change_data, change_dropout, refuse_model

PI = 0.5  # opening probability of a gate that is added
Params = dict[str, np.ndarray]


@dataclass(frozen=True)
class Origin:
    """A float checkpoint that a run begins with, and the sha256 of its file."""

    path: Path
    checkpoint: Checkpoint
    sha256: str

    def describe(self) -> dict[str, Any]:
        """What the run's own checkpoints keep of it: also what it was trained on, which must never evaluate them."""
        meta = self.checkpoint.meta
        own = meta.get("data", {}).get("hashes", {}).get("train", [])
        sections = dict.fromkeys([*meta.get("trained_on", []), *(section[:SHORT] for section in own)])
        about = {"begun_from": str(self.path)} | {
            key: meta[key] for key in ("images", "files") if meta.get(key) is not None
        }
        return about | ({"trained_on": list(sections)} if sections else {})


def open_origin(path: Path) -> Origin:
    """Raises FileError for a file that is none, is quantized, or of a run that diverged."""
    checkpoint = load_checkpoint(path)
    if checkpoint.recipe is not None or checkpoint.ranges:
        raise FileError(f"{path} is quantized: begin with the float checkpoint that it was made from")
    if "diverged_at" in checkpoint.meta:
        raise FileError(f"{path}: training diverged at step {checkpoint.meta['diverged_at']}: begin with another")
    return Origin(path, checkpoint, sha_of(file_of(path)))


def make_classifier(checkpoint: Checkpoint, classes: int, seed: int) -> tuple[ModelSpec, Params]:
    """The checkpoint's encoder with a new classifier, drawn from `seed`; BERT keeps its pooler where it has one.

    Raises SpecError for an OPT, which has no classifier.
    """
    spec = replace(checkpoint.spec, head=Head.CLASSIFY, classes=classes)
    encoder = {name: value for name, value in checkpoint.params.items() if not name.startswith("head.")}
    return spec, complete(encoder | find_pooler(checkpoint), spec, seed)


def find_pooler(checkpoint: Checkpoint) -> Params:
    """BERT's pooler: of a classifier, or kept from an imported encoder; empty where there is none."""
    own = {name: value for name, value in checkpoint.params.items() if name.startswith("head.pool.")}
    if own or checkpoint.spec.family is not Family.BERT or (imported := hub.pooler(checkpoint)) is None:
        return own
    weight, bias = imported
    return {"head.pool.weight": weight.astype(np.float32), "head.pool.bias": bias.astype(np.float32)}


def continue_model(
    checkpoint: Checkpoint, attention_name: str | None, seed: int, window: int | None = None
) -> tuple[ModelSpec, Params]:
    """The checkpoint's model to go on pre-training, with the attention of that name or its own; `alpha` of another
    divides by the window of the data, its length unless said.

    A linear gate that it does not have is added as the paper's appendix B.6 does; its softmax may change. A BERT or OPT
    without head gets one for its pre-training.

    Raises SpecError for an attention that would lose or change parameters, or a head that is not pre-trained.
    """
    spec = checkpoint.spec
    if spec.family is not Family.OPT and spec.head is (Head.CLASSIFY if spec.family is Family.BERT else Head.NONE):
        raise SpecError(f"a {spec.family} with head {spec.head} has no pre-training to go on with: use qtx finetune")
    head = {Family.BERT: Head.MLM, Family.OPT: Head.CAUSAL, Family.VIT: Head.CLASSIFY}[spec.family]
    spec, params = replace(spec, head=head), dict(checkpoint.params)
    if attention_name is not None:
        spec, params = change_attention(spec, params, attention_name, seed, window or spec.length)
    return spec, complete(params, spec, seed)


def continue_run(origin: Origin, run: RunSpec) -> tuple[ModelSpec, Params, DataSpec]:
    """The model of a run that goes on pre-training from a checkpoint, its first parameters, and its data: the
    checkpoint's with what the run says of them.

    Raises SpecError for what the checkpoint has already, and as `continue_model`.
    """
    refuse_model(run, "--init", ("data.tokenizer", "data.vocab"))
    meta = origin.checkpoint.meta
    about = change_data(meta, run) or DataSpec.of(meta.get("data", {}))
    spec, params = continue_model(origin.checkpoint, run.get("model.attention"), run.get("seed", 0), about.window)
    return change_dropout(spec, run), params, about


def load_continued(origin: Origin, spec: ModelSpec, about: DataSpec) -> Data:
    """The data of `continue_run`. Raises SpecError where they are gone or of another tokenizer, DataError where they
    would evaluate or calibrate on what the checkpoint was trained on."""
    meta = origin.checkpoint.meta
    own = about == DataSpec.of(meta.get("data", {}))
    data = open_data(origin.path, spec, meta, None if own else about, None)
    for split in ("evaluation", "calibration"):
        refuse_overlap(meta, data, split)
    return data


def change_attention(spec: ModelSpec, params: Params, name: str, seed: int, length: int) -> tuple[ModelSpec, Params]:
    """The model with the whole attention that `name` says, where its parameters can be kept; `alpha` is of `length`."""
    wanted, now = attention(name).with_length(length), spec.attention
    if wanted.gate is now.gate:
        if wanted.pi not in (None, now.pi) or wanted.gate_hidden not in (None, now.gate_hidden):
            raise SpecError(f"attention {name!r} sets up a gate that the model has already: leave its settings out")
        wanted = replace(wanted, pi=now.pi, rescaled=now.rescaled, gate_hidden=now.gate_hidden)
    elif now.gate is not Gate.NONE:
        raise SpecError(f"attention {name!r} drops the model's gate {now.gate}: name it too")
    elif wanted.gate is not Gate.LINEAR:
        raise SpecError(f"attention {name!r} adds the gate {wanted.gate}: only the linear one (gated) can be added")
    else:
        params, spec = add_gate(params, spec, PI if wanted.pi is None else wanted.pi, seed)
        wanted = replace(wanted, pi=spec.attention.pi, rescaled=True)
    return replace(spec, attention=wanted), params


def complete(params: Params, spec: ModelSpec, seed: int) -> Params:
    """Every parameter of the spec: those of `params`, and first values of those that it lacks."""
    return {
        name: params[name] if name in params else first_value(spec, name, shape, seed)
        for name, shape in shapes(spec).items()
    }
