"""`qtx quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from qtx_ref.spec import Nonlinear, Range, to_dict

from ..engines.machine import Machine
from ..files.artifact import SUFFIX
from ..jobs.quantize import NONLINEAR, PROFILE, QuantizeRequest, quantize
from ..recipes.named import NAMES
from .options import DATA, EITHER, JSON, MACHINE, OUT, describe_size, say, write_json

PROFILE_HELP = (  # of qtx_ref/profiles, in a line
    "qtx (fixed point, one rounding), float32 (requantizes in float32), gemmlowp (fixed point, two roundings), tflite "
    "(fixed point, one rounding, half up), onnx (QuantizeLinear and QLinearMatMul), another of qtx_ref/profiles, or a "
    "FILE.json like those"
)


@click.command(name="quantize")
@EITHER
@DATA
@click.option(
    "--recipe",
    "recipe_name",
    help=f"{NAMES}. Default: the checkpoint's own with the ranges it has, else w8a8. A "
    f"MODEL{SUFFIX} takes no fp8, mxfp or train-wXaY, and none that leaves a float before a table, norm or sum "
    "(paper-bert).",
)
@click.option(
    "--profile", "profile_name", default=PROFILE, show_default=True, help=f"Of a MODEL{SUFFIX}: {PROFILE_HELP}."
)
@click.option(
    "--nonlinear",
    type=click.Choice([str(kind) for kind in Nonlinear]),
    default=NONLINEAR,
    show_default=True,
    help=f"Of a MODEL{SUFFIX}: GELU, sigmoid, tanh and exponentials.",
)
@click.option(
    "--out",
    type=OUT,
    required=True,
    help=f"A {SUFFIX} of integers, or a .safetensors with ranges for fake quantization.",
)
@MACHINE
@JSON
def quantize_command(
    checkpoint: Path,
    data: str | None,
    tokenizer: Path | None,
    recipe_name: str | None,
    profile_name: str,
    nonlinear: str,
    out: Path,
    machine: Machine,
    json_path: str | None,
) -> None:
    """Write a model as integers, or with ranges.

    Calibrates a recipe's ranges, or takes the checkpoint's own, and writes one file: a MODEL.qtx of integers, or a
    .safetensors of parameters, ranges and recipe for fake quantization. Of a MODEL.qtx: the same codes and scales under
    --profile, with multipliers and biases derived anew.
    """
    request = QuantizeRequest(checkpoint, out, recipe_name, profile_name, nonlinear, data, tokenizer, machine)
    written = quantize(request)
    result = {"checkpoint": str(out), "recipe": to_dict(written.recipe), "ranges": written.words}
    result |= list_numbers(written.ranges)
    if written.profile is not None and written.size is not None:
        rest = f"profile {written.profile.name}, {describe_size(written.size)}; see qtx show {out}"
        result |= {"profile": to_dict(written.profile), "bytes": asdict(written.size)}
    else:
        rest = f"{len(written.ranges)} static ranges; run it with qtx evaluate {out}"
    say(f"{out}: recipe {written.recipe.name}, {written.words}, {rest}", json_path)
    write_json(json_path, result)


def list_numbers(ranges: Mapping[str, Range]) -> dict[str, dict[str, list[float]]]:
    """Scales and zero points by site."""
    return {
        key: {site: np.asarray(getattr(ends, key)).ravel().tolist() for site, ends in ranges.items()}
        for key in ("scale", "zero_point")
    }
