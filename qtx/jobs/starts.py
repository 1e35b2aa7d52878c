"""Beginning with a checkpoint's parameters: as a classifier, or going on with pre-training, also with a new attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qtx_ref.models.initial import add_gate, first_value, shapes
from qtx_ref.presets import attention
from qtx_ref.spec import Family, Gate, Head, ModelSpec, SpecError

from .. import hub
from ..files.checkpoint import Checkpoint, file_of, load_checkpoint
from ..files.container import CheckpointError, sha_of
from ..prepare.quantization import SHORT

PI = 0.5  # opening probability of a gate that is added
Params = dict[str, np.ndarray]


@dataclass(frozen=True)
class Origin:
    """A float checkpoint that a run begins with, and the sha256 of its file."""

    path: Path
    found: Checkpoint
    sha256: str

    def kept(self) -> dict:
        """What the run's own checkpoints keep of it: also what it was trained on, which must never evaluate them."""
        meta = self.found.meta
        own = meta.get("data", {}).get("hashes", {}).get("train", [])
        seen = dict.fromkeys([*meta.get("trained_on", []), *(found[:SHORT] for found in own)])
        kept = {"begun_from": str(self.path)} | {
            key: meta[key] for key in ("images", "files") if meta.get(key) is not None
        }
        return kept | ({"trained_on": list(seen)} if seen else {})


def open_origin(path: Path) -> Origin:
    """Raises CheckpointError for a file that is none, is quantized, or of a run that diverged."""
    found = load_checkpoint(path)
    if found.recipe is not None or found.ranges:
        raise CheckpointError(f"{path} is quantized: begin with the float checkpoint that it was made from")
    if "diverged_at" in found.meta:
        raise CheckpointError(f"{path}: training diverged at step {found.meta['diverged_at']}: begin with another")
    return Origin(path, found, sha_of(file_of(path)))


def classifier(found: Checkpoint, classes: int, seed: int, dropout: float | None = None) -> tuple[ModelSpec, Params]:
    """The checkpoint's encoder with a new classifier, drawn from `seed`; BERT keeps its pooler where it has one.

    dropout: of hidden states and of attention probabilities; None: the checkpoint's. Raises SpecError for an OPT, which has
    no classifier.
    """
    rates = {} if dropout is None else {"dropout": dropout, "attention_dropout": dropout}
    made = replace(found.spec, head=Head.CLASSIFY, classes=classes, **rates)
    kept = {name: value for name, value in found.params.items() if not name.startswith("head.")}
    return made, completed(kept | pooler(found), made, seed)


def pooler(found: Checkpoint) -> Params:
    """BERT's pooler: of a classifier, or kept from an imported encoder; empty where there is none."""
    own = {name: value for name, value in found.params.items() if name.startswith("head.pool.")}
    if own or found.spec.family is not Family.BERT or (came := hub.pooler(found)) is None:
        return own
    return {"head.pool.weight": came[0].astype(np.float32), "head.pool.bias": came[1].astype(np.float32)}


def continued(found: Checkpoint, attention_name: str | None, seed: int) -> tuple[ModelSpec, Params]:
    """The checkpoint's model to go on pre-training, with the attention of that name or its own.

    A linear gate that it does not have is added as the paper's appendix B.6 does; its softmax may change. A BERT or OPT
    without head gets one for its pre-training.

    Raises SpecError for an attention that would lose or change parameters, or a head that is not pre-trained.
    """
    spec = found.spec
    if spec.family is not Family.OPT and spec.head is (Head.CLASSIFY if spec.family is Family.BERT else Head.NONE):
        raise SpecError(f"a {spec.family} with head {spec.head} has no pre-training to go on with: use qtx finetune")
    head = {Family.BERT: Head.MLM, Family.OPT: Head.CAUSAL, Family.VIT: Head.CLASSIFY}[spec.family]
    made, params = replace(spec, head=head), found.params
    if attention_name is not None:
        made, params = with_attention(made, params, attention_name, seed)
    return made, completed(params, made, seed)


def with_attention(spec: ModelSpec, params: Params, name: str, seed: int) -> tuple[ModelSpec, Params]:
    """The model with the whole attention that `name` says, where its parameters can be kept."""
    wanted, now = attention(name), spec.attention
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


def completed(params: Params, spec: ModelSpec, seed: int) -> Params:
    """Every parameter of the spec: those of `params`, and first values of those that it lacks."""
    return {
        name: params[name] if name in params else first_value(spec, name, shape, seed)
        for name, shape in shapes(spec).items()
    }
