"""`qtx cost`."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import click

from qtx_ref.models.initial import init_params
from qtx_ref.presets import PRESETS, preset
from qtx_ref.profiles import profile
from qtx_ref.spec import Nonlinear, SpecError

from . import cost, quantization
from .artifact import SUFFIX, load_artifact, make_artifact, save_artifact
from .attention_cost import DEFAULT, attention_cost
from .backend import MissingExtra, backend
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .cli_quantize import ranges_of
from .data import DataError
from .files import CheckpointError, check_writable, write_beside
from .options import DATA, JSON, is_artifact, open_data, say, split_list, write_json
from .report.costs import attention_table, bars, cost_table, kernel_table, paragraph
from .training import Machine

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
@click.option("--out", type=click.Path(path_type=Path), help=f"A folder for {', '.join(NAMES)}.")
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
    check_out(out)
    module = backend(backend_name)
    workers = cost.Workers(backend_name, device, threads or module.threads())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if attentions is not None:
            given = recipe_name or profile_name or data or tokenizer
            if given:
                raise SpecError(f"{given!r} does not belong to --attention, which quantizes nothing; leave it out")
            spec = preset(model) if model else spec_of(checkpoint)
            sizes = list(product(batches, cost.lengths_of(spec, lengths)))
            rows = attention_cost(workers, spec, split_list(attentions), sizes, rounds, folder, training=training)
            result: dict[str, Any] = {"attentions": rows}
            text = attention_table(rows)
        else:
            result = measured(workers, folder, checkpoint, model, data, tokenizer, recipe_name, profile_name, batches, lengths,
                              rounds, engines, json_path)  # fmt: skip
            text = "\n\n".join([cost_table(result), kernel_table(result), paragraph(result)])
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


def spec_of(path: Path):
    return load_artifact(path).spec if is_artifact(path) else load_checkpoint(path).spec


def opened(path: Path | None, model: str | None) -> Checkpoint:
    """A checkpoint, or one of first parameters. Raises CheckpointError where training left no model."""
    if model is not None:
        spec = preset(model)
        return Checkpoint(spec, init_params(spec, 0))
    found = load_checkpoint(path)
    if "diverged_at" in found.meta:
        raise CheckpointError(f"{path}: training diverged at step {found.meta['diverged_at']}; no model is left to use")
    return found


class Random:
    """Random calibration batches, where a model has no data: times and memory are right, errors are not those of data."""

    def __init__(self, length: int) -> None:
        self.length = length

    def split_batches(self, split, spec, batch_size, seed, limit=None):
        return iter([cost.synthetic(spec, batch_size, self.length)] * min(limit or 1, 1))

    def hashes(self, split):
        return []


def measured(workers, folder, path, model, data, tokenizer, recipe_name, profile_name, batches, lengths, rounds, engines,
             json_path) -> dict[str, Any]:  # fmt: skip
    """Prepares the variants' files, compares them and times them."""
    machine = Machine(workers.common["backend"], workers.common["device"])
    given = path is not None and is_artifact(path)
    if given and (recipe_name or profile_name):
        raise SpecError(f"--recipe {recipe_name or profile_name}: {path} has its own; leave it out")
    chosen = cost.chosen_engines(engines, machine.backend, machine.device, lambda text: say(text, json_path))
    artifact = load_artifact(path) if given else None
    found = Checkpoint(artifact.spec, artifact.float_params(), meta=artifact.meta) if given else opened(path, model)
    spec = found.spec
    sizes = list(product(batches, cost.lengths_of(spec, lengths)))
    source, reason = None, "a preset has no data"
    if model is None:
        try:
            source = open_data(path, spec, found.meta, data, tokenizer)
        except (SpecError, DataError) as error:
            if data is not None or tokenizer is not None:
                raise
            reason = str(error)
    if source is None:
        say(f"random inputs and calibration, errors not those of data: {reason}", json_path)
    inputs = [cost.make_cell(spec, source, size, length) for size, length in sizes]
    calibrating = source or Random(sizes[0][1])
    plain, fake, whole = folder / "float.safetensors", folder / "fake.safetensors", folder / f"model{SUFFIX}"
    save_checkpoint(plain, Checkpoint(spec, found.params))
    variants = [cost.Variant("float32", "float32", plain)]
    if machine.backend == "torch":
        variants.append(cost.Variant("bfloat16", "bfloat16", plain))
    float_model = machine.model(spec, found.params)
    if given:
        recipe, ranges, integers = artifact.recipe, artifact.ranges(), cost.Variant("integers", "integer", path)
    else:
        recipe, ranges, _, _ = ranges_of(found, float_model, calibrating, recipe_name, None)
        integers = cost.Variant("integers", "integer", whole)
        try:
            meaning = profile(profile_name or "qtx")
            save_artifact(whole, make_artifact(plain, found, recipe, ranges, meaning, Nonlinear.TABLE, []))
        except SpecError as error:
            integers.finding = str(error)
    save_checkpoint(fake, Checkpoint(spec, found.params, {}, recipe, ranges))
    variants += [cost.Variant("fake quantization", "fake", fake), integers]
    variants += cost.engine_variants(chosen, plain, folder)
    masked = spec_masked(inputs)
    calibration = calibration_files(folder, spec, calibrating, recipe.batches or 1, masked) if chosen else []
    for cell in inputs:
        cost.write_batch(folder / f"{cell.name}.inputs", cell.inputs)
    cost.probe(workers, variants, inputs, folder, spec, masked, calibration)
    cost.measure(workers, variants, inputs, folder, rounds)
    cells = [
        {"name": c.name, "batch": c.batch, "length": c.length, "real": c.real, "padded": padded(c)} for c in inputs
    ]
    for cell in cells:
        if source is not None and not cell["real"]:
            say(f"{cell['name']}: random inputs, the evaluation data have none of this size", json_path)
    return {"recipe": recipe.name, "cells": cells, "variants": [as_record(variant) for variant in variants]}


def padded(cell: cost.Cell) -> bool:
    return "mask" in cell.inputs and not cell.inputs["mask"].all()


def spec_masked(cells: list[cost.Cell]) -> bool:
    """Whether an exported model needs a mask."""
    return any(padded(cell) for cell in cells)


def calibration_files(folder: Path, spec, source, limit: int, masked: bool) -> list[Path]:
    """Calibration batches for an engine's own tools; without a mask, of full sequences alone."""
    paths = []
    for i, batch in enumerate(source.split_batches("calibration", spec, quantization.BATCH, 0, limit=limit)):
        kept = {name: batch[name] for name in cost.INPUTS if name in batch}
        kept = kept if masked or "mask" not in kept else cost.full_rows(kept)
        if len(next(iter(kept.values()))):
            paths.append(folder / f"calibration-{i}.inputs")
            cost.write_batch(paths[-1], kept)
    return paths


def as_record(variant: cost.Variant) -> dict[str, Any]:
    """A variant as JSON values."""
    record = asdict(replace(variant, file=None, source=None))
    return {key: record[key] for key in ("name", "bytes", "finding", "cells", "profile")}


def write(out: Path, result: dict[str, Any], text: str) -> list[str]:
    """Table, JSON and, with matplotlib, the picture; the names of what is there."""
    write_json(str(out / "cost.json"), result)
    write_beside(out / "cost.txt", (text + "\n").encode())
    if "variants" not in result:
        return ["cost.json", "cost.txt"]
    with contextlib.suppress(MissingExtra):
        bars(out / "cost.png", result)
        return list(NAMES)
    return ["cost.json", "cost.txt"]
