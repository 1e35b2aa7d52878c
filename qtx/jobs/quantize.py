"""What `qtx quantize` does: one model, and the file of its integers or of its ranges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from qtx_ref.spec import Nonlinear, Profile, Range, Recipe, SpecError, check_integer

from ..engines.machine import Machine
from ..engines.protocols import Calibration
from ..files.artifact import SUFFIX, Size, load_artifact, make_artifact, measure_size, save_artifact
from ..files.checkpoint import Checkpoint, file_of, save_checkpoint
from ..files.container import FileError, check_writable
from ..files.profiles import read_profile
from ..prepare.prepare import Prepared
from ..recipes.named import recipe, resolve
from ..recipes.transforms import list_left_transforms
from .opening import is_artifact, name_recipe, open_checkpoint, open_data, prepare_anew, refuse_transformed

PROFILE, NONLINEAR = "qtx", "table"


@dataclass(frozen=True)
class QuantizeRequest:
    """A model, the file to write, and what its codes mean."""

    checkpoint: Path  # or an artifact, whose codes another profile is to have
    out: Path  # .qtx: integers; .safetensors: parameters, ranges and recipe for fake quantization
    recipe: str | None = None  # None: the checkpoint's own where it is quantized, else w8a8
    profile: str = PROFILE  # of integers: a name, or a .json file
    nonlinear: str = NONLINEAR  # of integers: how GELU, sigmoid, tanh and exponentials are computed
    data: str | None = None  # None: the model's own
    tokenizer: Path | None = None
    machine: Machine = Machine()


@dataclass(frozen=True)
class Quantized:
    """What was written: the file, the recipe, its static ranges by site and, in words, where they are from; of integers
    also the profile and the sizes."""

    path: Path
    recipe: Recipe
    ranges: dict[str, Range]
    words: str
    profile: Profile | None = None
    size: Size | None = None


def quantize(request: QuantizeRequest) -> Quantized:
    """Calibrates a recipe's ranges, or takes the checkpoint's own, and writes `request.out`; of an artifact, its codes
    and scales under the profile.

    Raises:
        SpecError: a recipe, profile or machine that does not exist or does not fit, or what cannot run in integers.
        DataError: data that cannot be had, do not fit, or trained the model.
        FileError: the checkpoint cannot be read, or `out` exists or cannot be written.
        MissingExtra: a backend or tokenizer whose package is not installed.
    """
    out = request.out
    check_out(out)
    if is_artifact(request.checkpoint):
        return convert_artifact(request)
    if not is_artifact(out) and (request.profile, request.nonlinear) != (PROFILE, NONLINEAR):
        raise SpecError(f"--profile and --nonlinear belong to integers: give --out a name ending in {SUFFIX}")
    meaning, nonlinear = read_profile(request.profile), read_nonlinear(request.nonlinear)
    request.machine.check()
    stored = open_checkpoint(request.checkpoint)
    chosen = choose_recipe(stored, request.recipe, meaning if is_artifact(out) else None)
    data = open_data(request.checkpoint, stored.spec, stored.meta, request.data, request.tokenizer)
    prepared, calibration, words = prepare_checkpoint(stored, request.machine, data, chosen)
    # again: another command may have written it meanwhile
    check_out(out)
    if not is_artifact(out):
        meta = {**stored.meta, "quantized_from": str(request.checkpoint), "calibration": calibration}
        save_checkpoint(
            out, Checkpoint(stored.spec, prepared.params, {}, chosen, prepared.ranges, meta, prepared.transforms)
        )
        return Quantized(out, chosen, prepared.ranges, words)
    rewritten = replace(stored, params=prepared.params, transforms=prepared.transforms)
    origin = file_of(request.checkpoint)
    artifact = make_artifact(origin, rewritten, chosen, prepared.ranges, meaning, nonlinear, calibration)
    save_artifact(out, artifact)
    return Quantized(out, chosen, prepared.ranges, words, meaning, measure_size(out, artifact))


def convert_artifact(request: QuantizeRequest) -> Quantized:
    """`quantize` of an artifact. Raises SpecError also for an option that it has no use for."""
    path, out = request.checkpoint, request.out
    if not is_artifact(out):
        raise SpecError(f"--out {out}: {path} is integers already; give a name ending in {SUFFIX}")
    if request.recipe or request.data or request.tokenizer or request.nonlinear != NONLINEAR:
        raise SpecError(f"--recipe, --nonlinear, --data and --tokenizer: {path} has its own; leave them out")
    stored = load_artifact(path)
    made = stored.under(read_profile(request.profile))
    save_artifact(out, made)
    words = f"codes and scales of {path}"
    return Quantized(out, made.recipe, made.ranges(), words, made.profile, measure_size(out, made))


def check_out(out: Path) -> None:
    """Raises SpecError or FileError where the file could not be written, or be read again under its name."""
    if out.suffix not in (SUFFIX, ".safetensors"):
        raise SpecError(f"--out {out}: give a name ending in {SUFFIX} (integers) or .safetensors (ranges)")
    if out.exists():
        raise FileError(f"{out} exists: choose another --out")
    check_writable(out)


def read_nonlinear(name: str) -> Nonlinear:
    """The member of that name. Raises SpecError where there is none."""
    try:
        return Nonlinear(name)
    except ValueError:
        raise SpecError(f"nonlinear is {name!r}: choose one of {', '.join(map(str, Nonlinear))}") from None


def choose_recipe(stored: Checkpoint, name: str | None, integers: Profile | None) -> Recipe:
    """The recipe of that name; None: the checkpoint's own where it is quantized, else w8a8.

    Raises SpecError, before any data are read, for one that does not exist, does not fit the model, or cannot run in
    integers under the profile `integers`.
    """
    own = stored.recipe if is_quantized(stored) and name in (None, name_recipe(stored)) else None
    chosen = own or recipe(name or "w8a8", stored.spec)
    quants = resolve(chosen, stored.spec)
    if integers is not None:
        check_integer(quants, integers, transforms=list_left_transforms(chosen, stored.spec))
    if own is None:
        refuse_transformed(stored, f"recipe {chosen.name}")
    return chosen


def prepare_checkpoint(
    stored: Checkpoint, machine: Machine, data: Calibration, chosen: Recipe
) -> tuple[Prepared, list[str], str]:
    """What a recipe makes of the model, hashes of the calibration data, and in words where the ranges are from: the
    checkpoint, where the recipe is its own, else its calibration data."""
    if chosen is stored.recipe and is_quantized(stored):
        # `qtx quantize` says what they were calibrated on; training takes the calibration split
        known = stored.meta.get("data", {}).get("hashes", {}).get("calibration", [])
        own = Prepared(stored.params, stored.ranges, stored.transforms)
        return own, stored.meta.get("calibration", known), "the checkpoint's own ranges"
    prepared = prepare_anew(stored, machine, data, chosen)
    return prepared, data.hashes("calibration"), f"ranges of {chosen.batches} calibration batches"


def is_quantized(stored: Checkpoint) -> bool:
    """Whether a checkpoint holds what its recipe makes, and not a model that is yet to be quantized by it."""
    return bool(stored.recipe and (stored.ranges or stored.transforms or stored.recipe.rewrite))
