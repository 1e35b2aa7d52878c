"""`qtx cost`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import click

from qtx_ref.models.initial import init_params
from qtx_ref.presets import PRESETS, preset
from qtx_ref.profiles import profile
from qtx_ref.spec import Nonlinear, Recipe, SpecError, check_integer

from ..cost import compare as cost
from ..cost.attention import DEFAULT, attention_cost
from ..cost.inputs import (
    Counted,
    Random,
    choose_lengths,
    make_cells,
    write_calibration,
    write_cell,
)
from ..data import DataError
from ..engines.backend import MissingExtra, backend
from ..files.artifact import SUFFIX, Artifact, load_artifact, make_artifact, save_artifact
from ..files.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ..files.container import COST, CheckpointError, check_writable, write_beside, write_sealed_json
from ..files.locks import make_scratch
from ..jobs.opening import is_artifact, open_data
from ..jobs.training import Machine
from ..progress import Progress
from ..recipes.named import resolve
from ..report.costs import describe_costs, draw_cost, tabulate_attentions, tabulate_costs, tabulate_kernels
from .options import DATA, JSON, OUT, hold_out, say, split_list, write_json
from .quantize import choose_recipe, ranges_of

NAMES = ("cost.json", "cost.txt", "cost.png")


def numbers(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """A comma list of whole numbers from 1 on."""
    if text is None:
        return None
    parts = split_list(text)
    if not parts or not all(part.isdigit() and int(part) >= 1 for part in parts):
        raise click.BadParameter(f"{text!r} is no comma list of whole numbers from 1 on")
    return tuple(dict.fromkeys(map(int, parts)))


@click.command(name="cost")
@click.argument("checkpoint", type=click.Path(path_type=Path), metavar=f"[CHECKPOINT|MODEL{SUFFIX}]", required=False)
@click.option("--model", help=f"A shape with first parameters, instead of a checkpoint: {', '.join(PRESETS)}.")
@DATA
@click.option(
    "--recipe", "recipe_name", help="Of fake quantization and integers; default: the checkpoint's own, or w8a8."
)
@click.option("--profile", "profile_name", help="Of integers; default: qtx.")
@click.option("--batch", "batches", default="1,8", show_default=True, callback=numbers, help="Sequences or images.")
@click.option("--length", "lengths", callback=numbers, help="Tokens of a sequence; default: 64,128, as far as it goes.")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="Timed passes of each variant.")
@click.option("--threads", type=click.IntRange(1), help="Of every engine; default: as the backend chooses.")
@click.option("--backend", "backend_name", default="torch", show_default=True, help="torch, or ref (NumPy).")
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda with --backend torch.")
@click.option("--engines", default="auto", show_default=True,
              help=f"auto (those installed), none, or a list of {', '.join(cost.ENGINES)}.")  # fmt: skip
@click.option("--attention", "attentions", is_flag=False, flag_value=DEFAULT,
              help=f"What clipped softmax and gates add to vanilla, instead; alone: {DEFAULT}.")  # fmt: skip
@click.option("--training", is_flag=True, help="With --attention: training steps too.")
@click.option("--out", type=OUT, help=f"A folder for {', '.join(NAMES)}.")
@JSON
def cost_command(checkpoint, model, data, tokenizer, recipe_name, profile_name, batches, lengths, rounds, threads,
                 backend_name, device, engines, attentions, training, out, json_path):  # fmt: skip
    """Does a quantized model run faster?

    Latency, throughput, memory and bytes of the same model in float, under fake quantization and in integers, beside other
    engines, all in turn; or, with --attention, what clipped softmax and each gate add.
    """
    if (checkpoint is None) == (model is None):
        raise SpecError("give a checkpoint or --model, one of them")
    if training and attentions is None:
        raise SpecError("--training belongs to --attention: give both")
    if attentions is not None and (unused := recipe_name or profile_name or data or tokenizer):
        raise SpecError(f"{unused!r} does not belong to --attention, which quantizes nothing; leave it out")
    if out is not None:
        hold_out(out)
    check_out(out)
    backend(backend_name).check_machine(device, "float32")

    def tell(text: str) -> None:
        say(text, json_path)

    chosen = cost.choose_engines("none" if attentions is not None else engines, backend_name, device, tell)
    workers = cost.Workers(backend_name, device, threads or backend(backend_name).threads())
    given = open_given(checkpoint, model, data, tokenizer, recipe_name, profile_name)
    sizes = list(product(batches, choose_lengths(given.found.spec, lengths)))
    with make_scratch() as folder:
        if attentions is not None:
            names = split_list(attentions)
            rows = attention_cost(workers, given.found.spec, names, sizes, rounds, folder, training=training)
            result: dict[str, Any] = {"attentions": rows}
            text = tabulate_attentions(rows)
        else:
            result = measured(workers, folder, given, sizes, rounds, chosen, tell)
            text = "\n\n".join([tabulate_costs(result), tabulate_kernels(result), describe_costs(result)])
    about = {"checkpoint": None if checkpoint is None else str(checkpoint), "model": model, "rounds": rounds}
    result = about | workers.common | result
    say(text, json_path)
    if out is not None:
        written = write(out, result, text)
        say(f"written to {out}: {', '.join(written)}", json_path)
    write_json(json_path, result)


def check_out(out: Path | None) -> None:
    """Raises CheckpointError where the folder holds results already, or cannot be written."""
    for name in NAMES if out is not None else ():
        if (out / name).exists():
            raise CheckpointError(f"{out / name} exists: choose another --out")
        check_writable(out / name)


@dataclass(frozen=True)
class Given:
    """The model that was asked for, and its data; None, and the reason, where it has none."""

    path: Path | None
    found: Checkpoint
    artifact: Artifact | None
    data: Any | None
    reason: str
    recipe: str | None
    profile: str | None


def open_given(path: Path | None, model: str | None, data: str | None, tokenizer: Path | None, recipe: str | None,
               profile_name: str | None) -> Given:  # fmt: skip
    """Raises SpecError, CheckpointError or DataError where it cannot be had, or data that were named cannot."""
    artifact = None
    if model is not None:
        found = Checkpoint(preset(model), init_params(preset(model), 0))
        if data is not None or tokenizer is not None:
            raise SpecError(f"--data {data or tokenizer}: --model {model} runs on random inputs; leave it out")
        return Given(path, found, None, None, "a preset has no data", recipe, profile_name)
    if is_artifact(path):
        if recipe or profile_name:
            name = f"--recipe {recipe}" if recipe else f"--profile {profile_name}"
            raise SpecError(f"{name}: {path} has its own; leave it out")
        artifact = load_artifact(path)
        found = Checkpoint(artifact.spec, artifact.float_params(), meta=artifact.meta)
    else:
        found = load_checkpoint(path)
        if "diverged_at" in found.meta:
            step = found.meta["diverged_at"]
            raise CheckpointError(f"{path}: training diverged at step {step}; no model is left to use")
        if found.transforms:
            raise SpecError(
                f"{path} is made for the transforms of {found.recipe.name}, so float32 is not among what it can run: give "
                f"the float checkpoint that it was made from, and --recipe {found.recipe.name}"
            )
    try:
        source = open_data(path, found.spec, found.meta, data, tokenizer)
    except (SpecError, DataError) as error:
        if data is not None or tokenizer is not None:
            raise
        return Given(path, found, artifact, None, str(error), recipe, profile_name)
    return Given(path, found, artifact, source, "", recipe, profile_name)


def measured(workers: cost.Workers, folder: Path, given: Given, sizes: list[tuple[int, int]], rounds: int,
             engines: tuple[str, ...], tell: Callable[[str], None]) -> dict[str, Any]:  # fmt: skip
    """Prepares the variants' files, compares them and times them."""
    spec, source = given.found.spec, given.data
    if source is None:
        tell(f"random inputs and calibration, so that errors are not those of data: {given.reason}")
    cells = make_cells(spec, source, sizes)
    for cell in cells:
        write_cell(folder, cell)
        if source is not None and not cell.real:
            tell(f"{cell.name}: random inputs, as the evaluation data have none of this size")
    longest = max(cell.length for cell in cells)
    calibrating = source or Random(longest)
    variants, recipe = own_variants(workers, folder, given, calibrating)
    variants += cost.list_engine_variants(engines, variants[0].file, folder)
    masked, files = any(cell.padded for cell in cells), []
    if engines:
        files = write_calibration(folder, spec, calibrating, recipe.batches, longest, masked)
    cost.probe(workers, variants, cells, folder, masked, files)
    cost.measure(workers, variants, cells, folder, rounds)
    shown = [{key: getattr(cell, key) for key in ("name", "batch", "length", "real", "padded")} for cell in cells]
    return {"recipe": recipe.name, "cells": shown, "variants": [as_record(variant) for variant in variants]}


def own_variants(
    workers: cost.Workers, folder: Path, given: Given, calibrating: Any
) -> tuple[list[cost.Variant], Recipe]:
    """The variants that are ours, float32 first, their files written; and the recipe."""
    found, spec = given.found, given.found.spec
    plain, fake, whole = folder / "float.safetensors", folder / "fake.safetensors", folder / f"model{SUFFIX}"
    save_checkpoint(plain, Checkpoint(spec, found.params))  # without an optimizer's state
    variants = [cost.Variant("float32", "float32", plain)]
    if workers.common["backend"] == "torch":
        variants.append(cost.Variant("bfloat16", "bfloat16", plain))
    if given.artifact is not None:
        recipe, params, ranges, transforms = given.artifact.recipe, found.params, given.artifact.ranges(), {}
        integers = cost.Variant("integers", "integer", given.path)
    else:
        meaning = profile(given.profile or "qtx")
        machine = Machine(workers.common["backend"], workers.common["device"])
        with Progress("calibrate", 0) as bar:
            recipe = choose_recipe(found, given.recipe, None)
            prepared, _, _ = ranges_of(found, machine, Counted(calibrating, bar), recipe)
        params, ranges, transforms = prepared.params, prepared.ranges, prepared.transforms
        integers = cost.Variant("integers", "integer", whole)
        try:
            check_integer(resolve(recipe, spec), meaning, transforms=transforms)
            rewritten = replace(found, params=params, transforms=transforms)
            save_artifact(whole, make_artifact(plain, rewritten, recipe, ranges, meaning, Nonlinear.TABLE, []))
        except SpecError as error:  # such as a recipe of small floats
            integers.finding = str(error)
    save_checkpoint(fake, Checkpoint(spec, params, {}, recipe, ranges, transforms=transforms))
    return [*variants, cost.Variant("fake quantization", "fake", fake), integers], recipe


def as_record(variant: cost.Variant) -> dict[str, Any]:
    """A variant as JSON values."""
    return {key: getattr(variant, key) for key in ("name", "bytes", "finding", "cells", "profile")}


def write(out: Path, result: dict[str, Any], text: str) -> list[str]:
    """Table, JSON and, with matplotlib, the picture; the names of what is there."""
    write_sealed_json(out / "cost.json", COST, result)
    write_beside(out / "cost.txt", (text + "\n").encode())
    if "variants" not in result:
        return ["cost.json", "cost.txt"]
    with contextlib.suppress(MissingExtra):
        draw_cost(out / "cost.png", result)
        return list(NAMES)
    return ["cost.json", "cost.txt"]
