"""What the commands share: options, and output for people and for programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import wraps
from pathlib import Path
from typing import Any

import click

from qtx_ref.spec import SpecError

from ..engines.machine import Machine
from ..files.artifact import SUFFIX, Size
from ..files.container import RESULT, FileError, check_writable, to_json, write_beside
from ..jobs.training import check_rate
from ..report.tables import format_number, format_table

Command = Callable[..., Any]  # what click calls, with an option's value by its name
Decorator = Callable[[Command], Command]

# in the folders that train, study, export, analyze, ptq and cost write
WRITTEN = (
    "model.safetensors",
    "run.toml",
    "log.jsonl",
    "output.txt",
    "study.json",
    "curves.png",
    "inf_norm.png",
    "tensorboard",
    "config.json",
    "tokenizer.json",
    "preprocessor_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "ptq.json",
    "ptq.png",
    "cost.json",
    "cost.txt",
    "cost.png",
    "analysis.json",
    "depth.png",
    "channels.png",
    "histogram.png",
    "attention.png",
    "patches.png",
)
NUMBERED = re.compile(r"model-[0-9]{6,}\.(safetensors|shares)")  # states of a run that are kept, see files.shares
PLACES = ("checkpoint", "model", "init", "first", "second", "out", "check", "data", "tokenizer", "recipe_name")


class OutPath(click.Path):
    """A place to write. An empty name, which would be the current folder, is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            raise SpecError("--out is '': name a place to write")
        place = super().convert(value, param, ctx)
        try:
            Path(str(place)).exists()
        except OSError as error:
            raise SpecError(f"--out {str(place)[:200]} cannot be written ({error.strerror}): choose another") from None
        return place


class Rate(click.ParamType):
    """A learning rate; see `check_rate`."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return check_rate(float(value))
        except SpecError as error:
            raise SpecError(f"--lr {value}: {error}") from None
        except ValueError:
            raise SpecError(f"--lr {value!r} is no number") from None


OUT, RATE = OutPath(), Rate()


def check_json(ctx: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """Refuses a place that cannot be written, or where something else than such a result is, before any work."""
    if path is not None and path != "-":
        try:
            check_writable(Path(path), RESULT)
        except FileError as error:
            raise SpecError(f"--json: {error}") from None
    return path


def refuse_shared(given: Mapping[str, Any]) -> None:
    """Raises SpecError where --json names a file that the command reads or writes for another purpose."""
    json_path, out = given["json_path"], given.get("out")
    if json_path in (None, "-"):
        return
    place = Path(json_path).resolve()
    named = [(name, given[name]) for name in PLACES if given.get(name) is not None]
    if (run := given.get("run")) is not None:
        named += [("init", run.get("init")), ("tokenizer", run.get("data.tokenizer"))]
        named += [("data", source.path) for source in run.get("data.sources", ())]
    for name, path in named:
        if path is not None and Path(path).resolve() == place:
            raise SpecError(f"--json {json_path} is also the command's {name}: choose another file")
    written = place.name in WRITTEN or NUMBERED.fullmatch(place.name)
    if out is not None and written and place.is_relative_to(out.resolve()):
        raise SpecError(f"--json {json_path} is a file that the command writes: choose another")


def with_json(command: Command) -> Command:
    """--json FILE, which is no other file of the command."""

    @wraps(command)
    def checked(**given: Any) -> Any:
        refuse_shared(given)
        return command(**given)

    option = click.option("--json", "json_path", callback=check_json, help="Also write JSON there; - is stdout.")
    return option(checked)


class Number(click.ParamType):
    """A finite number from `low` to `high`. What is not 0 and rounds to it is refused."""

    name = "number"

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number, exact = float(value), Decimal(str(value))
        except (ValueError, ArithmeticError):
            self.fail(f"{value!r} is no number", param, ctx)
        if not self.low <= number <= self.high or (number == 0) != (exact == 0):
            self.fail(f"{value} is no number from {self.low:g} to {self.high:g} that a float64 holds", param, ctx)
        return number


def options(*chosen: Decorator) -> Decorator:
    """Several options as one decorator, in their order."""

    def decorate(command: Command) -> Command:
        for option in reversed(chosen):
            command = option(command)
        return command

    return decorate


def with_machine(command: Command) -> Command:
    """--backend, --device and --dtype as one `machine`, which is checked before anything is read."""

    @wraps(command)
    def checked(backend_name: str, device: str, dtype: str, **given: Any) -> Any:
        machine = Machine(backend_name, device, dtype)
        machine.check()
        return command(machine=machine, **given)

    return PLACE(checked)


PLACE = options(
    click.option("--backend", "backend_name", default="torch", show_default=True, help="torch, or ref (NumPy)."),
    click.option("--device", default="cpu", show_default=True, help="cpu; with torch cuda, or auto."),
    click.option(
        "--dtype", default="float32", show_default=True, help="float32, float64; with torch bfloat16 or float16."
    ),
)
MACHINE = with_machine
JSON = with_json
DATA_HELP = (
    "books, digits, backcopy, unigram, a text file, a .csv, .jsonl or .parquet with a column `text`, a folder of .txt, "
    ".jsonl or .parquet, or hub:NAME; of a classifier a .csv or .jsonl of text and label, or a folder of pictures per "
    "class; default: the model's own."
)
TOKENIZER_HELP = "A tokenizer.json for your own text."
DATA = options(
    click.option("--data", help=DATA_HELP),
    click.option("--tokenizer", type=click.Path(path_type=Path), help=TOKENIZER_HELP),
)
CHECKPOINT = click.argument("checkpoint", type=click.Path(path_type=Path))
ARTIFACT = click.argument("model", type=click.Path(path_type=Path), metavar=f"MODEL{SUFFIX}")
EITHER = click.argument("checkpoint", type=click.Path(path_type=Path), metavar=f"CHECKPOINT|MODEL{SUFFIX}")
RECIPE = click.option(
    "--recipe", "recipe_name", help="float, or a recipe to calibrate and apply; default: the checkpoint's own."
)
LIMIT = click.option("--batches", type=click.IntRange(1), help="At most this many evaluation batches.")


def write_json(path: str | None, result: Mapping[str, Any]) -> None:
    """The result of a command, with its format, to stdout (-) or a file."""
    if path is None:
        return
    text = to_json({"format": RESULT, **result})
    if path == "-":
        click.echo(text, nl=False)
    else:
        write_beside(Path(path), text.encode())


def say(text: str, json_path: str | None) -> None:
    """Prints for people: on stderr where stdout carries JSON."""
    click.echo(text, err=json_path == "-")


def tabulate_result(path: Path, result: Mapping[str, object]) -> str:
    """A file's results as a table, a line each."""
    rows = [[key, format_number(value, 4) if isinstance(value, float) else str(value)] for key, value in result.items()]
    return format_table(["", str(path)], rows)


def describe_size(size: Size) -> str:
    """An artifact's size in bytes, and what it is beside what must be stored."""
    return (
        f"{size.file:,} bytes, {size.file / size.tensors:.4f} times its tensors, "
        f"{size.file / size.codes:.4f} times the weights' codes alone"
    )


def split_list(text: str) -> tuple[str, ...]:
    """The parts of a comma list, without the empty ones."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
