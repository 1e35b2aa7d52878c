"""The command line. Every error that a user can mend is one line on stderr and exit status 1."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from qtx_ref.presets import PRESETS, attention, preset
from qtx_ref.spec import SpecError, to_dict

from . import __version__, analysis, quantization, recipes
from .backend import MissingExtra, backend, need
from .checkpoint import (
    Checkpoint,
    CheckpointError,
    check_writable,
    load_checkpoint,
    save_checkpoint,
    write_beside,
)
from .data import DataError, load
from .progress import Progress, clock
from .report.tables import number, table
from .study import Study, StudySpec
from .training import Interrupted, Machine, TrainSpec, default_optim, train, widened

MENDABLE = (SpecError, DataError, CheckpointError, MissingExtra, OSError)


class Commands(click.Group):
    """Turns mendable errors into one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Interrupted as stop:
            click.echo(f"\n{stop}; the same command with --resume goes on", err=True)
            ctx.exit(130)
        except KeyboardInterrupt:
            resumes = ctx.invoked_subcommand in ("study", "train")
            click.echo("\nstopped" + ("; the same command with --resume goes on" if resumes else ""), err=True)
            ctx.exit(130)
        except MENDABLE as error:
            raise click.ClickException(" ".join(str(error).split())) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Quantized transformers: train without outliers, quantize, and prove what the integers mean."""


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


def open_checkpoint(path: Path, machine: Machine, data_name: str | None, tokenizer: Path | None):
    """A checkpoint, its model in float, and data to evaluate it on: its own unless said otherwise, its own tokenizer."""
    checkpoint = load_checkpoint(path)
    if "diverged_at" in checkpoint.meta:
        raise CheckpointError(
            f"{path}: training diverged at step {checkpoint.meta['diverged_at']}; no model is left to use"
        )
    about = checkpoint.meta.get("data", {})
    source = about.get("source") if data_name is None else data_name
    data = load(source, checkpoint.spec, tokenizer=tokenizer or checkpoint.meta.get("tokenizer"))
    trained_with, given = about.get("tokenizer_sha256"), data.describe().get("tokenizer_sha256")
    if trained_with != given:
        raise SpecError(
            f"tokenizer {given and given[:12]} is not the one of {path} ({trained_with and trained_with[:12]})"
        )
    return checkpoint, machine.model(checkpoint.spec, checkpoint.params), data


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


@main.command()
@click.option("--model", default="opt-tiny", show_default=True, help=f"One of {', '.join(PRESETS)}.")
@DATA
@VOCAB
@click.option(
    "--steps", type=click.IntRange(1), default=StudySpec.steps, show_default=True, help="Training steps of each run."
)
@click.option("--batch", type=click.IntRange(1), default=StudySpec.batch, show_default=True, help="Sequences per step.")
@click.option("--lr", type=float, help="Peak learning rate; default 1e-3 for the tiny models, 1e-4 for larger ones.")
@click.option("--attention", "attentions", default="vanilla,clipped,gated", show_default=True,
              help="Comma list; `clipped:gamma=-0.03`, `mlp`, `clipped+gated:pi=0.25`, ...")  # fmt: skip
@click.option("--recipe", "recipe_name", help="One quantization recipe: the same as --bits with one name.")
@click.option("--bits", help="Comma list of recipes, a column each: w8a8,w6a6,paper-opt,... (default w8a8)")
@click.option("--train-quant", help="Train all models again with quantized matmuls, for example w8a8.")
@MACHINE
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Number of seeds, from --seed on.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/study"), show_default=True)
@click.option("--resume", is_flag=True, help="Go on with the study in --out, if there is one.")
@JSON
def study(model, data, tokenizer, vocab, steps, batch, lr, attentions, recipe_name, bits, train_quant, backend_name, device,
          dtype, seed, seeds, out, resume, json_path):  # fmt: skip
    """Train, quantize and compare attentions: the paper's table."""
    if recipe_name and bits:
        raise SpecError(f"--recipe {recipe_name} and --bits {bits}: give one of them")
    spec = StudySpec(
        model=model,
        data=data,
        tokenizer=None if tokenizer is None else str(tokenizer),
        vocab=vocab,
        steps=steps,
        batch=batch,
        lr=lr,
        attention=split_list(attentions),
        recipes=split_list(recipe_name or bits or "w8a8"),
        train_quant=train_quant,
        seeds=tuple(range(seed, seed + seeds)),
        machine=Machine(backend_name, device, dtype),
    )
    job = Study(spec, out, resume=resume)
    job.run()
    say(job.table(), json_path)
    say(f"written to {out}: {', '.join(job.written)}", json_path)
    write_json(json_path, json.loads(job.path.read_text(encoding="utf-8")))


@main.command(name="train")
@click.option("--model", default="opt-tiny", show_default=True, help=f"One of {', '.join(PRESETS)}.")
@DATA
@VOCAB
@click.option("--attention", "attention_name", default="vanilla", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=StudySpec.steps, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=StudySpec.batch, show_default=True)
@click.option("--lr", type=float, help="Peak learning rate; default 1e-3 for the tiny models, 1e-4 for larger ones.")
@click.option(
    "--train-quant", help="Quantize while training: w8a8 (matmuls, per token), lsq-w8a8 (learned ranges), ..."
)
@MACHINE
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/train"), show_default=True)
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
@JSON
def train_command(model, data, tokenizer, vocab, attention_name, steps, batch, lr, train_quant, backend_name, device, dtype,
                  seed, out, resume, json_path):  # fmt: skip
    """Train one model; leaves OUT/model.safetensors."""
    spec = replace(preset(model), attention=attention(attention_name))
    machine = Machine(backend_name, device, dtype)
    source = load(data, spec, tokenizer=tokenizer, vocab=vocab)
    run = TrainSpec(widened(spec, source), default_optim(spec, steps, lr), batch, seed, train_quant)
    path = out / "model.safetensors"
    checkpoint = train(run, source, path, machine, resume=resume, label=attention_name)
    curve = checkpoint.extra["history.loss"]
    state = " (diverged)" if checkpoint.meta["diverged"] else ""
    say(f"{path}: {len(curve)} steps, loss {curve[-20:].mean():.4f}{state}", json_path)
    write_json(json_path, {"checkpoint": str(path), "diverged": checkpoint.meta["diverged"], "loss": curve.tolist()})


@main.command()
@CHECKPOINT
@DATA
@click.option(
    "--recipe", "recipe_name", help="float, or a recipe to calibrate and apply; default: the checkpoint's own."
)
@LIMIT
@MACHINE
@JSON
def evaluate(checkpoint, data, tokenizer, recipe_name, batches, backend_name, device, dtype, json_path):
    """Perplexity (or accuracy) of a checkpoint, in float or under fake quantization."""
    machine = Machine(backend_name, device, dtype)
    found, model, source = open_checkpoint(checkpoint, machine, data, tokenizer)
    quantization.refuse_overlap(found.meta, source, "evaluation")
    numerics = as_evaluated(found, model, source, recipe_name)

    def evaluation():
        return source.split_batches("evaluation", found.spec, quantization.BATCH, 0, limit=batches)

    score = quantization.evaluate(model, evaluation(), f"evaluate {numerics}", sum(1 for _ in evaluation()))
    result = {"numerics": numerics, **quantization.as_json(score)}
    rows = [[key, number(value, 4) if isinstance(value, float) else str(value)] for key, value in result.items()]
    say(table(["", str(checkpoint)], rows), json_path)
    write_json(json_path, result)


@main.command()
@CHECKPOINT
@DATA
@click.option("--recipe", "recipe_name", default="w8a8", show_default=True, help=recipes.NAMES)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The file to write, a .safetensors.")
@MACHINE
@JSON
def quantize(checkpoint, data, tokenizer, recipe_name, out, backend_name, device, dtype, json_path):
    """Calibrate a recipe's ranges and write parameters, ranges and recipe to one file."""
    if out.exists():
        raise CheckpointError(f"{out} exists: choose another --out")
    check_writable(out)
    machine = Machine(backend_name, device, dtype)
    found, model, source = open_checkpoint(checkpoint, machine, data, tokenizer)
    chosen = recipes.recipe(recipe_name, found.spec)
    quantization.refuse_overlap(found.meta, source, "calibration")
    ranges = quantization.calibrate(model, source, chosen, 0)
    meta = {**found.meta, "quantized_from": str(checkpoint), "calibration": source.hashes("calibration")}
    save_checkpoint(out, Checkpoint(found.spec, found.params, {}, chosen, ranges, meta))
    say(f"{out}: recipe {chosen.name}, {len(ranges)} static ranges; run it with qtx evaluate {out}", json_path)
    scales = {site: np.asarray(r.scale).ravel().tolist() for site, r in ranges.items()}
    zeros = {site: np.asarray(r.zero_point).ravel().tolist() for site, r in ranges.items()}
    write_json(json_path, {"checkpoint": str(out), "recipe": to_dict(chosen), "scale": scales, "zero_point": zeros})


@main.command()
@CHECKPOINT
@DATA
@LIMIT
@MACHINE
@JSON
def analyze(checkpoint, data, tokenizer, batches, backend_name, device, dtype, json_path):
    """Outliers per site and by depth, and where attention goes."""
    found, model, source = open_checkpoint(checkpoint, Machine(backend_name, device, dtype), data, tokenizer)

    def evaluation():
        return source.split_batches("evaluation", found.spec, quantization.BATCH, 0, limit=batches or 16)

    statistics, masses = analysis.analyze(model, source, evaluation(), sum(1 for _ in evaluation()))
    header = ["site", "inf norm", "largest", "kurtosis", "published", "top 1% energy", "> 6 sigma", "per million"]
    rows = [
        [s.site, number(s.inf_norm, 2), number(s.inf_norm_max, 2), number(s.kurtosis, 2), number(s.kurtosis_published, 2),
         f"{100 * s.top_energy:.1f} %", str(s.beyond_6_sigma), number(1e6 * s.beyond_6_sigma / s.elements, 1)]
        for s in statistics
    ]  # fmt: skip
    say(table(header, rows), json_path)
    say("\nby depth, the residual stream and what is added to it\n" + depth_table(statistics), json_path)
    if masses:
        heads = [[m.site, m.mark, *(f"{100 * h:.1f}" for h in m.heads)] for m in masses]
        names = [f"head {i}" for i in range(found.spec.heads)]
        say(
            "\nmean attention probability on marked keys, percent\n" + table(["site", "keys", *names], heads), json_path
        )
    write_json(json_path, {"sites": [asdict(s) for s in statistics], "attention": [asdict(m) for m in masses]})


def depth_table(statistics: Sequence[analysis.SiteStatistics]) -> str:
    by_site = {s.site: s for s in statistics}
    parts = ("attn.output", "attn.residual", "ffn.output", "ffn.residual")
    layers = sum(site.endswith(".ffn.output") for site in by_site)
    rows = []
    for i in range(layers):
        found = [by_site[f"layer.{i}.{part}"] for part in parts]
        rows.append([f"layer {i}", *(number(s.inf_norm, 2) for s in found), *(number(s.kurtosis, 2) for s in found)])
    header = ["", *(f"{part} inf" for part in parts), *(f"{part} kurt" for part in parts)]
    return table(header, rows)


@main.command()
@CHECKPOINT
@click.option("--prompt", required=True, help="Text to go on from.")
@click.option("--tokens", type=click.IntRange(1), default=40, show_default=True, help="Number of new tokens.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--recipe", "recipe_name", help="float, or a recipe to calibrate and apply; default: the checkpoint's own."
)
@DATA
@MACHINE
@JSON
def generate(checkpoint, prompt, tokens, temperature, seed, recipe_name, data, tokenizer, backend_name, device, dtype,
             json_path):  # fmt: skip
    """Go on with a text, token by token, with cached keys and values (OPT)."""
    from qtx_ref.random import stream

    machine = Machine(backend_name, device, dtype)
    found, model, source = open_checkpoint(checkpoint, machine, data, tokenizer)
    backend(backend_name).check_generation(found.spec, {}, 1)
    as_evaluated(found, model, source, recipe_name)
    tokenizers = need("tokenizers", "text", "a prompt")
    words = tokenizers.Tokenizer.from_str(source.tokenizer_json)
    start = np.array([words.encode(prompt, add_special_tokens=False).ids], np.int64)
    if start.size == 0:
        raise SpecError(f"prompt {prompt!r} has no token: give some text")
    rng = stream(seed, "generate")

    def choose(logits: np.ndarray) -> np.ndarray:  # (B, V) -> (B,); Gumbel: argmax of logits / t + noise is a sample
        noise = rng.gumbel(size=logits.shape) * temperature
        return (logits + noise).argmax(axis=-1)

    text = model.generate(start, tokens, choose)[0].tolist()
    say(words.decode(text), json_path)
    write_json(json_path, {"tokens": text, "prompt_tokens": start.size, "text": words.decode(text)})


@main.command(name="recipes")
@click.argument("name", required=False)
@click.option("--model", default="opt-tiny", show_default=True, help="The model that the recipe is for.")
@click.option("--attention", "attention_name", default="vanilla", show_default=True)
@JSON
def recipes_command(name, model, attention_name, json_path):
    """Print a recipe as JSON, each rule with its source, and the sites it quantizes in a model."""
    if name is None:
        click.echo(f"recipes: {recipes.NAMES}")
        return
    spec = replace(preset(model), attention=attention(attention_name))
    chosen = recipes.recipe(name, spec)
    resolved = {site: to_dict(quant) for site, quant in recipes.resolve(chosen, spec).items()}
    write_json(json_path or "-", {"recipe": to_dict(chosen), "sites": resolved})


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--backend", "backend_name", default="torch", show_default=True,
              help="torch: held to the reference. ref: the reference held to outside truth.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--only", help="Only cases whose group/name contains this text or matches this pattern.")
@JSON
def parity(checkpoint, backend_name, device, dtype, only, json_path):
    """Prove that the backends agree, by case or on your own CHECKPOINT. Exit status 1 if anything fails."""
    from parity_tests import runner  # only here: the proof is not needed to use qtx

    report = run_parity(runner, checkpoint, backend_name, device, dtype, only)
    say(table(runner.HEADER, runner.report_rows(report)), json_path)
    groups = ", ".join(f"{group} {count}" for group, count in report.counts.items())
    failed = sum(not row.ok for row in report.rows)
    say(f"{len(report.rows)} cases ({groups}): {failed} failed, {clock(report.seconds)}", json_path)
    if report.first:
        say(f"the backends part first at site {report.first}", json_path)
    write_json(json_path, report.as_json())
    if not report.ok:
        sys.exit(1)


def run_parity(runner: Any, path: Path | None, backend_name: str, device: str, dtype: str, only: str | None) -> Any:
    backend(backend_name)
    with Progress("parity", 0) as bar:

        def seen(done: int, total: int, row: Any) -> None:
            bar.total = total
            bar.advance(note=row.name)

        if path is None:
            return runner.run(backend=backend_name, device=device, dtype=dtype, only=only, progress=seen)
        return parity_of(runner, path, backend_name, device, dtype, only, seen)


def parity_of(runner: Any, path: Path, backend_name: str, device: str, dtype: str, only: str | None, seen: Any) -> Any:
    for name, value, accepted in (("--backend", backend_name, "torch"), ("--dtype", dtype, "float32")):
        if value != accepted:
            raise SpecError(f"{name} is {value!r}: a checkpoint is compared between ref and {accepted}")
    if only:
        raise SpecError(f"--only {only}: a checkpoint has no table of cases; leave it out")
    found, _, source = open_checkpoint(path, Machine("ref"), None, None)
    batches = list(source.split_batches("evaluation", found.spec, 4, 0, limit=1))
    quants = recipes.resolve(found.recipe, found.spec) if found.recipe else {}
    masked = found.recipe.masked_scores if found.recipe else False
    return runner.check_checkpoint(
        found.spec, found.params, batches, quants, found.ranges, masked_scores=masked, device=device, progress=seen
    )
