"""`qtx quantize`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from qtx_ref.profiles import profile
from qtx_ref.spec import (
    Nonlinear,
    Profile,
    Range,
    Recipe,
    SpecError,
    check_integer,
    to_dict,
)

from ..files.artifact import SUFFIX, make_artifact, measure_size, save_artifact
from ..files.checkpoint import Checkpoint, file_of, save_checkpoint
from ..files.container import CheckpointError, check_writable
from ..jobs.opening import is_artifact, open_checkpoint, open_data, prepare_anew, refuse_transformed
from ..jobs.training import Machine
from ..prepare.prepare import Prepared
from ..recipes import named as recipes
from ..recipes.transforms import list_left_transforms
from .artifact import size_text
from .options import CHECKPOINT, DATA, JSON, MACHINE, OUT, say, write_json

PROFILE_HELP = (  # of qtx_ref/profiles, in a line
    "qtx (fixed point, one rounding), float32 (requantizes in float32), gemmlowp (fixed point, two roundings), tflite "
    "(fixed point, one rounding, ties away from 0) or onnx (QuantizeLinear and QLinearMatMul)"
)


@click.command()
@CHECKPOINT
@DATA
@click.option("--recipe", "recipe_name",
              help=f"{recipes.NAMES}. Default: the checkpoint's own with the ranges it has, else w8a8. A "
              f"MODEL{SUFFIX} takes no fp8, mxfp or train-wXaY, and none that leaves a float before a table, norm or sum "
              "(paper-bert).")  # fmt: skip
@click.option(
    "--profile", "profile_name", default="qtx", show_default=True, help=f"Of a MODEL{SUFFIX}: {PROFILE_HELP}."
)
@click.option("--nonlinear", type=click.Choice([str(kind) for kind in Nonlinear]), default="table", show_default=True,
              help=f"Of a MODEL{SUFFIX}: GELU, sigmoid, tanh and exponentials.")  # fmt: skip
@click.option("--out", type=OUT, required=True,
              help=f"A {SUFFIX} of integers, or a .safetensors with ranges for fake quantization.")  # fmt: skip
@MACHINE
@JSON
def quantize(
    checkpoint, data, tokenizer, recipe_name, profile_name, nonlinear, out, backend_name, device, dtype, json_path
):
    """Write a model as integers, or with ranges.

    Calibrates a recipe's ranges, or takes the checkpoint's own, and writes one file: a MODEL.qtx of integers, or a
    .safetensors of parameters, ranges and recipe for fake quantization.
    """
    check_out(out)
    if not is_artifact(out) and (profile_name, nonlinear) != ("qtx", "table"):
        raise SpecError(f"--profile and --nonlinear belong to integers: give --out a name ending in {SUFFIX}")
    meaning, kind = profile(profile_name), Nonlinear(nonlinear)
    machine = Machine(backend_name, device, dtype)
    found = open_checkpoint(checkpoint)
    chosen = choose_recipe(found, recipe_name, meaning if is_artifact(out) else None)
    source = open_data(checkpoint, found.spec, found.meta, data, tokenizer)
    prepared, calibration, words = ranges_of(found, machine, source, chosen)
    ranges = prepared.ranges
    result = {"checkpoint": str(out), "recipe": to_dict(chosen), "ranges": words, **numbers_of(ranges)}
    if is_artifact(out):
        made = make_artifact(
            file_of(checkpoint),
            replace(found, params=prepared.params, transforms=prepared.transforms),
            chosen,
            ranges,
            meaning,
            kind,
            calibration,
        )
        save_artifact(out, made)
        sizes = measure_size(out, made)
        rest = f"profile {profile_name}, {size_text(sizes)}; see qtx show {out}"
        result |= {"profile": to_dict(meaning), "bytes": asdict(sizes)}
    else:
        meta = {**found.meta, "quantized_from": str(checkpoint), "calibration": calibration}
        save_checkpoint(out, Checkpoint(found.spec, prepared.params, {}, chosen, ranges, meta, prepared.transforms))
        rest = f"{len(ranges)} static ranges; run it with qtx evaluate {out}"
    say(f"{out}: recipe {chosen.name}, {words}, {rest}", json_path)
    write_json(json_path, result)


def check_out(out: Path) -> None:
    """Raises SpecError or CheckpointError where the file could not be written, or be read again under its name."""
    if out.suffix not in (SUFFIX, ".safetensors"):
        raise SpecError(f"--out {out}: give a name ending in {SUFFIX} (integers) or .safetensors (ranges)")
    if out.exists():
        raise CheckpointError(f"{out} exists: choose another --out")
    check_writable(out)


def choose_recipe(found: Checkpoint, recipe_name: str | None, integers: Profile | None) -> Recipe:
    """The recipe of that name; None: the checkpoint's own where it is quantized, else w8a8.

    Raises SpecError, before any data are read, for one that does not exist, does not fit the model, or cannot run in
    integers under the profile `integers`.
    """
    own = quantized(found) and recipe_name in (None, found.recipe.name)
    chosen = found.recipe if own else recipes.recipe(recipe_name or "w8a8", found.spec)
    quants = recipes.resolve(chosen, found.spec)
    if integers is not None:
        check_integer(quants, integers, transforms=list_left_transforms(chosen, found.spec))
    if not own:
        refuse_transformed(found, f"recipe {chosen.name}")
    return chosen


def ranges_of(found: Checkpoint, machine: Machine, source: Any, chosen: Recipe) -> tuple[Prepared, list[str], str]:
    """What a recipe makes of the model, hashes of the calibration data, and in words where the ranges are from: the
    checkpoint, where the recipe is its own, else its calibration data."""
    if chosen is found.recipe and quantized(found):
        # `qtx quantize` says what they were calibrated on; training takes the calibration split
        known = found.meta.get("data", {}).get("hashes", {}).get("calibration", [])
        own = Prepared(found.params, found.ranges, found.transforms)
        return own, found.meta.get("calibration", known), "the checkpoint's own ranges"
    prepared = prepare_anew(found, machine, source, chosen)
    return prepared, source.hashes("calibration"), f"ranges of {chosen.batches} calibration batches"


def quantized(found: Checkpoint) -> bool:
    """Whether a checkpoint holds what its recipe makes, and not a model that is yet to be quantized by it."""
    return bool(found.recipe and (found.ranges or found.transforms or found.recipe.rewrite))


def numbers_of(ranges: dict[str, Range]) -> dict[str, dict[str, list]]:
    """Scales and zero points by site."""
    return {
        key: {site: np.asarray(getattr(found, key)).ravel().tolist() for site, found in ranges.items()}
        for key in ("scale", "zero_point")
    }
