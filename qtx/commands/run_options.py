"""The options of commands that take a run: a file, names for its common keys, and `--set` for every key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click

from qtx_ref.presets import PRESETS

from ..runs.reading import RunSpec, Setting, make_run, open_run, parse_setting
from .options import DATA_HELP, RATE, TOKENIZER_HELP, Command, Decorator, options, split_list

SAID = "qtx.run"  # where a command line's context keeps what options say
FILE = "NAME|FILE.toml"


class Names(click.ParamType):
    """A comma list."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return split_list(value) if isinstance(value, str) else value


NAMES = Names()


def run_option(name: str, *keys: str, beside: Mapping[str, Any] | None = None, **more: Any) -> Decorator:
    """An option that is a name for `keys` of a run; where it is given, the keys of `beside` are said too."""

    def keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value is not None:
            given = dict.fromkeys(keys, str(value) if isinstance(value, Path) else value)
            run = make_run(given | dict(beside or {}), name)
            ctx.meta.setdefault(SAID, {}).update(run.settings)

    return click.option(name, callback=keep, expose_value=False, **more)


def with_run(*chosen: Decorator, argument: bool = True, reads: Sequence[str] = ()) -> Decorator:
    """A command that takes a run, as its argument or by --run, with these options over it, and --set over them.

    reads: the keys and tables that it takes of a file, where it has no use for the others.
    """

    def decorate(command: Command) -> Command:
        @wraps(command)
        def laid(run_name: str | None, said: tuple[str, ...], **given: Any) -> Any:
            settings: dict[str, Setting] = dict(click.get_current_context().meta.get(SAID, {}))
            for text in said:
                settings |= parse_setting(text).settings
            run = open_run(run_name) if run_name is not None else RunSpec()
            if reads:
                run = run.only(reads)
            return command(run=run.under(RunSpec(settings)), **given)

        about = f"A run{f', of which {chr(44).join(reads)} are read' if reads else ''}; see qtx runs."
        place = (
            click.argument("run_name", required=False, metavar=f"[{FILE}]")
            if argument
            else click.option("--run", "run_name", metavar=FILE, help=about)
        )
        each = click.option(
            "--set", "said", multiple=True, metavar="KEY=VALUE", help="Any key of a run; qtx runs --keys lists them."
        )
        return options(place, *chosen, each)(laid)

    return decorate


MODEL = run_option("--model", "model.preset", help=f"One of {', '.join(PRESETS)}; default opt-tiny, without --init.")
ATTENTION = run_option(
    "--attention",
    "model.attention",
    help="Default vanilla, or that of --init; to its model a linear gate (gated:pi=0.5) may be added, or its softmax "
    "changed (clipped).",
)
INIT = run_option(
    "--init",
    "init",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="Go on pre-training from its parameters, with its tokenizer.",
)
SOURCE = run_option("--data", "data.sources", help=DATA_HELP)
TOKENIZER = run_option("--tokenizer", "data.tokenizer", type=click.Path(path_type=Path), help=TOKENIZER_HELP)
VOCAB = run_option(
    "--vocab", "data.vocab", type=click.IntRange(1), help="Entries of the tokenizer trained on your own text."
)
STEPS = run_option("--steps", "optim.steps", type=click.IntRange(1), help="Training steps; default 350.")
BATCH = run_option("--batch", "data.batch", type=click.IntRange(1), help="Sequences or images per step; default 16.")
RATES = run_option(
    "--lr",
    "optim.lr",
    type=RATE,
    help="Peak learning rate; default 1e-3 for the tiny models, 1e-4 for larger ones.",
)
TRAIN_QUANT = run_option(
    "--train-quant",
    "quant.train",
    help="Quantize while training: w8a8 (matmuls, per token), lsq-w8a8 (learned ranges), ...",
)
WATCH = run_option(
    "--watch-integer",
    "evaluation.every",
    beside={"evaluation.batches": 2, "evaluation.integers": ["w8a8"]},
    type=click.IntRange(1),
    metavar="N",
    help="Before training, every N steps and after the last: quantize the model (w8a8), run it in "
    "integers and in float on the first 2 evaluation batches; ranges, inf norm and kurtosis are of 2 "
    "calibration batches.",
)
SEED = run_option("--seed", "seed", type=click.IntRange(0), help="Default 0.")
STOP = run_option("--stop", "stop", type=click.IntRange(1), help="The last step, where it is not the schedule's.")
CHANGES = options(
    click.option(
        "--change",
        multiple=True,
        metavar="KEY",
        help="With --resume: a key, or a table, that is not as it was: optim.steps, optim, step, data.batch, ...",
    ),
    click.option("--move", is_flag=True, help="With --resume: to another device, number of threads or of processes."),
)
PLACE = options(
    run_option("--backend", "machine.backend", help="torch, or ref (NumPy); default torch."),
    run_option("--device", "machine.device", help="cpu; cuda, or auto, with --backend torch; default cpu."),
    run_option("--dtype", "machine.dtype", help="float32, float64; with torch bfloat16 or float16; default float32."),
)
