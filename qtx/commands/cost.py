"""`qtx cost`."""

from __future__ import annotations

from pathlib import Path

import click

from qtx_ref.presets import PRESETS

from ..cost.attention import DEFAULT
from ..cost.compare import ENGINES
from ..files.artifact import SUFFIX
from ..jobs.cost import NAMES, ROUNDS, SIZES, CostRequest, measure_cost
from .options import DATA, JSON, OUT, say, split_list, write_json


def read_numbers(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
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
@click.option("--profile", "profile_name", help="Of integers: a name, or a FILE.json; default: qtx.")
@click.option(
    "--batch",
    "batches",
    default=",".join(map(str, SIZES)),
    show_default=True,
    callback=read_numbers,
    help="Sequences or images.",
)
@click.option(
    "--length", "lengths", callback=read_numbers, help="Tokens of a sequence; default: 64,128, as far as it goes."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=ROUNDS, show_default=True, help="Timed passes of each variant."
)
@click.option("--threads", type=click.IntRange(1), help="Of every engine; default: as the backend chooses.")
@click.option("--backend", "backend_name", default="torch", show_default=True, help="torch, or ref (NumPy).")
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda with --backend torch.")
@click.option("--compiled", is_flag=True, help="Integers by torch.compile too, which takes a minute at first.")
@click.option(
    "--engines",
    default="auto",
    show_default=True,
    help=f"auto (those installed), none, or a list of {', '.join(ENGINES)}.",
)
@click.option(
    "--attention",
    "attentions",
    is_flag=False,
    flag_value=DEFAULT,
    help=f"What clipped softmax and gates add to vanilla, instead; alone: {DEFAULT}.",
)
@click.option("--training", is_flag=True, help="With --attention: training steps too.")
@click.option("--out", type=OUT, help=f"A folder for {', '.join(NAMES)}.")
@JSON
def cost_command(
    checkpoint: Path | None,
    model: str | None,
    data: str | None,
    tokenizer: Path | None,
    recipe_name: str | None,
    profile_name: str | None,
    batches: tuple[int, ...],
    lengths: tuple[int, ...] | None,
    rounds: int,
    threads: int | None,
    backend_name: str,
    device: str,
    compiled: bool,
    engines: str,
    attentions: str | None,
    training: bool,
    out: Path | None,
    json_path: str | None,
) -> None:
    """Does a quantized model run faster?

    Latency, throughput, memory and bytes of the same model in float, under fake quantization and in integers, beside
    other engines, all in turn; or, with --attention, what clipped softmax and each gate add.
    """
    request = CostRequest(
        checkpoint=checkpoint,
        model=model,
        data=data,
        tokenizer=tokenizer,
        recipe=recipe_name,
        profile=profile_name,
        batches=batches,
        lengths=lengths,
        rounds=rounds,
        threads=threads,
        backend=backend_name,
        device=device,
        compiled=compiled,
        engines=engines,
        attentions=None if attentions is None else split_list(attentions),
        training=training,
        out=out,
    )
    costs = measure_cost(request, lambda words: say(words, json_path))
    say(costs.text, json_path)
    if costs.written:
        say(f"written to {out}: {', '.join(costs.written)}", json_path)
    write_json(json_path, costs.result)
