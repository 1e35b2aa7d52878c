"""Opening a model as a command runs it: a checkpoint or an artifact, its data, its recipe."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from qtx_ref.integer.model import accumulator_bits
from qtx_ref.spec import QTX, Family, Head, ModelSpec, Profile, Recipe, SpecError

from ..data import DataSpec, load, splits
from ..data.documents import is_there
from ..engines.backend import backend
from ..engines.machine import Machine
from ..engines.protocols import Calibration, Data, IntegerModel, Model, Runnable
from ..files.artifact import SUFFIX, Artifact, load_artifact
from ..files.checkpoint import Checkpoint, load_checkpoint
from ..files.container import FileError
from ..files.profiles import read_profile
from ..measure import scores
from ..prepare import calibration, prepare
from ..recipes import named as recipes
from ..recipes.sites import sites


def open_data(
    path: Path, spec: ModelSpec, meta: Mapping[str, Any], given: DataSpec | str | None, tokenizer: Path | None
) -> Data:
    """The data to evaluate or train a model on, with its own tokenizer: its own (None), others cut and ordered as its
    own (a name), or as said. Raises SpecError where they are gone, or another tokenizer's."""
    need_tokenizer(path, spec, meta)
    about = meta.get("data", {})
    settings = given if isinstance(given, DataSpec) else DataSpec.of(about, given)
    for source in settings.sources if given is None else ():
        if not is_there(source.path):
            raise SpecError(f"{path} has its data from {source.path}, which is not there now: say where with --data")
    own = {"length": about.get("length"), "names": about.get("names"), "scaling": meta.get("images")}
    data = load(settings, spec, tokenizer=tokenizer or meta.get("tokenizer"), **own)
    check_tokenizer(path, meta, data)
    return data


def load_data(about: DataSpec, spec: ModelSpec) -> Data:
    """The data of a run whose model is not trained yet. Raises SpecError, DataError where they cannot be had or do not
    fit it."""
    return load(about, spec)


def need_tokenizer(path: Path, spec: ModelSpec, meta: Mapping[str, Any]) -> None:
    """Raises SpecError for an imported model of text without the tokenizer that its token ids are of."""
    if spec.family is not Family.VIT and "hub" in meta and not meta.get("tokenizer"):
        raise SpecError(
            f"{path} is a model whose import found no tokenizer.json: import it again with one in its folder"
        )


def check_tokenizer(path: Path, meta: Mapping[str, Any], data: Data) -> None:
    """Raises SpecError where data are not read with the tokenizer of a checkpoint's own."""
    trained_with = meta.get("data", {}).get("tokenizer_sha256")
    given = data.describe().get("tokenizer_sha256")
    if trained_with != given:
        raise SpecError(
            f"tokenizer {given and str(given)[:12]} is not the one of {path} ({trained_with and trained_with[:12]})"
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint that holds a model. Raises FileError where it cannot be read, or its training diverged."""
    checkpoint = load_checkpoint(path)
    if "diverged_at" in checkpoint.meta:
        raise FileError(f"{path}: training diverged at step {checkpoint.meta['diverged_at']}; no model is left to use")
    return checkpoint


def make_float_model(checkpoint: Checkpoint, machine: Machine) -> Model:
    """The checkpoint's model in float, with the transforms for which its parameters are made."""
    model = machine.model(checkpoint.spec, checkpoint.params)
    model.bind({}, {}, transforms=checkpoint.transforms)
    return model


def is_artifact(path: Path) -> bool:
    """Whether a name stands for integers. What the file then is, its content says, and a wrong name is refused."""
    return path.suffix == SUFFIX


@dataclass(frozen=True)
class Opened:
    """A model as a command runs it, where it came from, data to run it on, and what it is in words."""

    stored: Checkpoint | Artifact
    model: Model | IntegerModel
    data: Data
    numerics: str
    integer: bool = False
    note: str = ""

    @property
    def scored(self) -> Runnable:
        """What `scores.evaluate` takes."""
        return scores.IntegerScorer(cast(IntegerModel, self.model)) if self.integer else cast(Model, self.model)


def open_model(
    path: Path,
    machine: Machine,
    data_name: str | None = None,
    tokenizer: Path | None = None,
    *,
    recipe_name: str | None = None,
    numerics: str | None = None,
    strict: bool = False,
    compiled: bool = False,
    profile_name: str | None = None,
    split: str | None = None,
    check: Callable[[Checkpoint | Artifact], None] = lambda stored: None,
) -> Opened:
    """A checkpoint in float or under a recipe, or an artifact in integers or fake quantization; data of `split` are
    compared with those it was trained and calibrated on.

    check: refuses a file that the command cannot use, before any data are read.

    Raises:
        SpecError, FileError, DataError, MissingExtra: a file, data, or an option that does not belong to it.
    """
    if is_artifact(path):
        if recipe_name is not None:
            raise SpecError(f"--recipe {recipe_name}: {path} has its own; leave it out")
        artifact, kind = load_artifact(path), numerics or "integer"
        check(artifact)
        if profile_name is not None:
            artifact = artifact.under(read_profile(profile_name))
        runner = make_artifact_model(artifact, machine, kind, strict, compiled)
        data = open_split(path, artifact, data_name, tokenizer, split)
        fast = compiled and getattr(runner, "execution", None) is not None  # not where nothing can be compiled
        how = ", strict" if strict else ", compiled" if fast else ""
        words = f"{kind}{how}, {artifact.recipe.name}, profile {artifact.profile.name}"
        return Opened(artifact, runner, data, words, kind == "integer", describe_head(artifact))
    if numerics or strict or compiled:
        raise SpecError(f"--numerics, --strict and --compiled belong to a MODEL{SUFFIX}; make one with qtx quantize")
    stored = open_checkpoint(path)
    chosen = find_recipe(stored, recipe_name)
    check(stored)
    if profile_name is not None and chosen is None:
        raise SpecError(f"--profile {profile_name}: {path} runs in float; give a --recipe, or a MODEL{SUFFIX}")
    profile = QTX if profile_name is None else read_profile(profile_name)
    data = open_split(path, stored, data_name, tokenizer, split)
    model = make_model(stored, machine, data, chosen, profile)
    words = (
        "float" if chosen is None else chosen.name if profile_name is None else f"{chosen.name}, profile {profile.name}"
    )
    return Opened(stored, model, data, words)


def open_split(
    path: Path, stored: Checkpoint | Artifact, name: str | None, tokenizer: Path | None, split: str | None
) -> Data:
    """The model's data. Raises DataError where those of `split` trained or calibrated it."""
    data = open_data(path, stored.spec, stored.meta, name, tokenizer)
    if split:
        splits.refuse_overlap(stored.meta, data, split)
    return data


def need_head(path: Path, spec: ModelSpec) -> None:
    """Raises SpecError where a model has no head, and so no words or classes to tell."""
    if spec.head is Head.NONE:
        raise SpecError(f"{path} has no head: it can be analyzed and compared, not evaluated or asked for words")


def make_artifact_model(
    artifact: Artifact, machine: Machine, numerics: str = "integer", strict: bool = False, compiled: bool = False
) -> Model | IntegerModel:
    """The model in integers, or under the fake quantization of the same codes. Raises SpecError for what does not go
    together, and for a model that cannot be compiled."""
    if compiled and numerics == "fake":
        raise SpecError("--compiled belongs to --numerics integer: fake quantization is floats")
    if compiled and machine.backend == "ref":
        raise SpecError("--compiled belongs to --backend torch: the reference is not compiled; leave one of them out")
    if compiled and strict:
        raise SpecError(
            "--compiled and --strict do not go together: a compiled graph has floats; leave one of them out"
        )
    if numerics == "fake":
        if strict:
            raise SpecError("--strict belongs to --numerics integer: fake quantization is floats")
        model = machine.model(artifact.spec, artifact.float_params())
        masked = artifact.recipe.masked_scores
        model.bind(artifact.quants, artifact.ranges(), masked_scores=masked, profile=artifact.profile)
        return model
    if machine.dtype != "float32":
        raise SpecError(f"--dtype {machine.dtype}: an integer model has no float dtype; leave it out")
    make = backend(machine.backend).IntegerModel
    options: dict[str, Any] = {"compiled": True} if compiled else {}  # which the reference has not
    meaning = artifact.spec, artifact.constants, artifact.quants, artifact.profile
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = make(*meaning, device=machine.device, strict=strict, **options)
    for one in said:  # that there is no compiler
        sys.stderr.write(f"note: {one.message}\n")
    return made


def describe_head(artifact: Artifact) -> str:
    """What becomes of a language model's last linear where the recipe leaves its weights or its result in float."""
    quants, order = artifact.quants, sites(artifact.spec).results
    own, result = "head.decoder.weight" in quants, "head.decoder" in quants
    if artifact.spec.head not in (Head.MLM, Head.CAUSAL) or (own and result):
        return ""
    name = "head.decoder.weight" if own else "embed.token.weight"
    weight = quants[name]
    codes = f"{'int' if weight.has_sign else 'uint'}{weight.bits}"
    part = "whose result" if own else "whose weights" if result else "which"
    note = f"head.decoder, {part} recipe {artifact.recipe.name} leaves in float, multiplies the {codes} codes of {name}"
    if result:
        return note
    entering = quants.get("head.decoder.input", quants.get(order[order.index("head.decoder") - 1]))
    return f"{note}; its int{accumulator_bits(entering, weight)} accumulators are the output"


def find_recipe(checkpoint: Checkpoint, recipe_name: str | None) -> Recipe | None:
    """The recipe that a checkpoint is run under: its own, or the one of that name; None for float. Raises SpecError for
    one that does not exist, or does not fit the model."""
    if recipe_name == "float" or (recipe_name is None and checkpoint.recipe is None):
        return None
    if recipe_name is None:
        return checkpoint.recipe
    chosen = recipes.recipe(recipe_name, checkpoint.spec)
    recipes.resolve(chosen, checkpoint.spec)
    refuse_transformed(checkpoint, f"recipe {chosen.name}")
    return chosen


def make_model(
    checkpoint: Checkpoint, machine: Machine, data: Calibration, chosen: Recipe | None, profile: Profile = QTX
) -> Model:
    """The model that a checkpoint is run as: in float, under its own recipe, or under another, calibrated here; by the
    rules of a profile."""
    if chosen is not None and chosen is not checkpoint.recipe:
        return prepare_anew(checkpoint, machine, data, chosen).model(machine, checkpoint.spec, chosen, profile)
    model = make_float_model(checkpoint, machine)
    if chosen is not None:
        calibration.bind(model, chosen, checkpoint.ranges, checkpoint.transforms, profile)
    return model


def name_recipe(checkpoint: Checkpoint) -> str:
    """The name of its own recipe, float without one."""
    return "float" if checkpoint.recipe is None else checkpoint.recipe.name


def refuse_transformed(checkpoint: Checkpoint, what: str) -> None:
    """Raises SpecError where the parameters are made for transforms, without which they are another model."""
    if checkpoint.transforms:
        raise SpecError(
            f"{what}: the checkpoint's weights are made for the transforms of {name_recipe(checkpoint)}; take the "
            "float checkpoint that it was made from"
        )


def prepare_anew(checkpoint: Checkpoint, machine: Machine, data: Calibration, chosen: Recipe) -> prepare.Prepared:
    """A checkpoint's parameters under a recipe, from its calibration data. Raises SpecError where the parameters are
    made for transforms of another recipe, and for data that the checkpoint knows from another split."""
    refuse_transformed(checkpoint, f"recipe {chosen.name}")
    splits.refuse_overlap(checkpoint.meta, data, "calibration")
    batches = calibration.calibration_batches(data, checkpoint.spec)
    return prepare.prepare(machine, checkpoint.spec, checkpoint.params, batches, chosen)
