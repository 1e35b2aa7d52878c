"""What the commands share: options, output for people and for programs, opening a checkpoint with its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qtx_ref.spec import Head, ModelSpec, SpecError

from . import quantization, recipes
from .artifact import SUFFIX, Artifact
from .backend import backend
from .checkpoint import Checkpoint, load_checkpoint
from .data import load
from .files import CheckpointError, check_writable, write_beside
from .training import Machine


def check_json(ctx: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """Refuses a place that cannot be written, or a file that is no JSON, before any work."""
    if path is not None and path != "-":
        if Path(path).exists() and Path(path).suffix != ".json":
            raise CheckpointError(f"--json {path} exists and is no .json file: choose another")
        check_writable(Path(path))
    return path


def options(*chosen: Any) -> Any:
    def decorate(command: Any) -> Any:
        for option in reversed(chosen):
            command = option(command)
        return command

    return decorate


MACHINE = options(
    click.option("--backend", "backend_name", default="torch", show_default=True, help="torch, or ref (NumPy)."),
    click.option("--device", default="cpu", show_default=True, help="cpu, or cuda with --backend torch."),
    click.option("--dtype", default="float32", show_default=True, help="float32, float64; bfloat16 with torch."),
)
JSON = click.option("--json", "json_path", callback=check_json, help="Also write JSON there; - is stdout.")
DATA = options(
    click.option("--data", help="books, digits, a text file or a folder of .txt; default: the model's own."),
    click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json for your own text."),
)
VOCAB = click.option("--vocab", type=click.IntRange(1), help="Entries of the tokenizer trained on your own text.")
WATCH = click.option("--watch-integer", type=click.IntRange(1), metavar="N",
                     help="Every N steps, quantize the model (w8a8) and run it in integers.")  # fmt: skip
CHECKPOINT = click.argument("checkpoint", type=click.Path(path_type=Path))
LIMIT = click.option("--batches", type=click.IntRange(1), help="At most this many evaluation batches.")


def write_json(path: str | None, result: Any) -> None:
    if path is None:
        return
    text = json.dumps(result, indent=1, allow_nan=False)
    if path == "-":
        click.echo(text)
    else:
        write_beside(Path(path), (text + "\n").encode())


def say(text: str, json_path: str | None) -> None:
    """Prints for people: on stderr where stdout carries JSON."""
    click.echo(text, err=json_path == "-")


def split_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def open_data(path: Path, spec: ModelSpec, meta: dict[str, Any], name: str | None, tokenizer: Path | None) -> Any:
    """The data to evaluate a model on: its own unless said otherwise, with its own tokenizer."""
    about = meta.get("data", {})
    source = about.get("source") if name is None else name
    data = load(source, spec, tokenizer=tokenizer or meta.get("tokenizer"))
    trained_with, given = about.get("tokenizer_sha256"), data.describe().get("tokenizer_sha256")
    if trained_with != given:
        raise SpecError(
            f"tokenizer {given and given[:12]} is not the one of {path} ({trained_with and trained_with[:12]})"
        )
    return data


def open_checkpoint(path: Path, machine: Machine, data_name: str | None, tokenizer: Path | None):
    """A checkpoint, its model in float, and data to evaluate it on."""
    checkpoint = load_checkpoint(path)
    if "diverged_at" in checkpoint.meta:
        raise CheckpointError(
            f"{path}: training diverged at step {checkpoint.meta['diverged_at']}; no model is left to use"
        )
    data = open_data(path, checkpoint.spec, checkpoint.meta, data_name, tokenizer)
    return checkpoint, machine.model(checkpoint.spec, checkpoint.params), data


def is_artifact(path: Path) -> bool:
    return path.suffix == SUFFIX


def artifact_model(artifact: Artifact, machine: Machine, numerics: str = "integer", strict: bool = False) -> Any:
    """The model in integers, or under the fake quantization of the same codes."""
    if numerics == "fake":
        if strict:
            raise SpecError("--strict belongs to --numerics integer: fake quantization is floats")
        model = machine.model(artifact.spec, artifact.float_params())
        model.bind(artifact.quants, artifact.ranges(), masked_scores=artifact.recipe.masked_scores)
        return model
    if machine.dtype != "float32":
        raise SpecError(f"--dtype {machine.dtype}: an integer model has no float dtype; leave it out")
    make = backend(machine.backend).IntegerModel
    return make(
        artifact.spec, artifact.constants, artifact.quants, artifact.profile, device=machine.device, strict=strict
    )


def head_note(artifact: Artifact) -> str:
    """What becomes of a head that the recipe leaves in float."""
    if artifact.spec.head not in (Head.MLM, Head.CAUSAL) or "head.decoder.weight" in artifact.quants:
        return ""
    bits = artifact.quants["embed.token.weight"].bits
    return (
        f"head.decoder, which recipe {artifact.recipe.name} leaves in float, multiplies the int{bits} codes of "
        "embed.token.weight; its int32 accumulators are the output"
    )


def as_evaluated(checkpoint: Checkpoint, model: Any, data: Any, recipe_name: str | None) -> str:
    """Binds what a checkpoint is evaluated under, and says it: its own recipe, another, or float."""
    if recipe_name == "float" or (recipe_name is None and checkpoint.recipe is None):
        return "float"
    if recipe_name is None:
        quantization.bind(model, checkpoint.recipe, checkpoint.ranges)
        return checkpoint.recipe.name
    chosen = recipes.recipe(recipe_name, checkpoint.spec)
    quantization.refuse_overlap(checkpoint.meta, data, "calibration")
    quantization.bind(model, chosen, quantization.calibrate(model, data, chosen, 0))
    return chosen.name
