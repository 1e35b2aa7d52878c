"""What the commands share: options, output for people and for programs, opening a checkpoint with its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import wraps
from pathlib import Path
from typing import Any

import click

from qtx_ref.integer.model import accumulator_bits
from qtx_ref.spec import Family, Head, ModelSpec, Recipe, SpecError

from ..data import Dataset, load
from ..engines.backend import backend
from ..files.artifact import SUFFIX, Artifact, load_artifact
from ..files.checkpoint import Checkpoint, load_checkpoint
from ..files.container import RESULT, CheckpointError, check_writable, to_json, write_beside
from ..files.locks import hold
from ..jobs.run import Machine, refuse_existing
from ..jobs.training import check_rate
from ..prepare import quantization
from ..recipes import named as recipes
from ..recipes.sites import sites

# in the folders that train, study, export, analyze, ptq and cost write
WRITTEN = ("model.safetensors", "study.json", "curves.png", "config.json", "tokenizer.json", "preprocessor_config.json",
           "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
           "ptq.json", "ptq.png", "cost.json", "cost.txt", "cost.png",
           "analysis.json", "depth.png", "channels.png", "histogram.png", "attention.png", "patches.png")  # fmt: skip
PLACES = ("checkpoint", "model", "init", "first", "second", "out", "check", "data", "tokenizer", "recipe_name")


class OutPath(click.Path):
    """A place to write. An empty name, which would be the current folder, is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            raise SpecError("--out is '': name a place to write")
        return super().convert(value, param, ctx)


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


def hold_out(out: Path) -> None:
    """The folder is the command's until its end. Raises CheckpointError where another process holds it; see `locks.hold`."""
    click.get_current_context().with_resource(hold(out))


def claim(path: Path, resume: bool) -> None:
    """A run's file is the command's to write. Raises CheckpointError where it is there and not to be gone on with, cannot be
    written, or another process holds its folder."""
    refuse_existing(path, resume)
    hold_out(path.parent)
    check_writable(path)


def check_json(ctx: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """Refuses a place that cannot be written, or where something else than such a result is, before any work."""
    if path is not None and path != "-":
        try:
            check_writable(Path(path), RESULT)
        except CheckpointError as error:
            raise SpecError(f"--json: {error}") from None
    return path


def refuse_shared(given: dict[str, Any]) -> None:
    """Raises SpecError where --json names a file that the command reads or writes for another purpose."""
    json_path, out = given["json_path"], given.get("out")
    if json_path in (None, "-"):
        return
    place = Path(json_path).resolve()
    for name in PLACES:
        if given.get(name) is not None and Path(given[name]).resolve() == place:
            raise SpecError(f"--json {json_path} is also the command's {name}: choose another file")
    if out is not None and place.name in WRITTEN and place.is_relative_to(out.resolve()):
        raise SpecError(f"--json {json_path} is a file that the command writes: choose another")


def with_json(command: Any) -> Any:
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


def options(*chosen: Any) -> Any:
    def decorate(command: Any) -> Any:
        for option in reversed(chosen):
            command = option(command)
        return command

    return decorate


def with_machine(command: Any) -> Any:
    """--backend, --device and --dtype, of which the backend is asked before anything is read."""

    @wraps(command)
    def checked(**given: Any) -> Any:
        backend(given["backend_name"]).check_machine(given["device"], given["dtype"])
        return command(**given)

    return PLACE(checked)


PLACE = options(
    click.option("--backend", "backend_name", default="torch", show_default=True, help="torch, or ref (NumPy)."),
    click.option("--device", default="cpu", show_default=True, help="cpu, or cuda with --backend torch."),
    click.option("--dtype", default="float32", show_default=True, help="float32, float64; bfloat16 with torch."),
)
MACHINE = with_machine
JSON = with_json
DATA = options(
    click.option(
        "--data",
        help="books, digits, a text file or a folder of .txt; of a classifier a .csv or .jsonl of text and label, "
        "or a folder of pictures per class; default: the model's own.",
    ),
    click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json for your own text."),
)
VOCAB = click.option("--vocab", type=click.IntRange(1), help="Entries of the tokenizer trained on your own text.")
WATCH = click.option("--watch-integer", type=click.IntRange(1), metavar="N",
                     help="Before training, every N steps and after the last: quantize the model (w8a8), run it in "
                     "integers and in float on the first 2 evaluation batches; ranges, inf norm and kurtosis are of 2 "
                     "calibration batches.")  # fmt: skip
CHECKPOINT = click.argument("checkpoint", type=click.Path(path_type=Path))
EITHER = click.argument("checkpoint", type=click.Path(path_type=Path), metavar=f"CHECKPOINT|MODEL{SUFFIX}")
LIMIT = click.option("--batches", type=click.IntRange(1), help="At most this many evaluation batches.")


def write_json(path: str | None, result: dict[str, Any]) -> None:
    """The result of a command, with its format, to stdout (-) or a file."""
    if path is None:
        return
    text = to_json({"format": RESULT} | result)
    if path == "-":
        click.echo(text, nl=False)
    else:
        write_beside(Path(path), text.encode())


def say(text: str, json_path: str | None) -> None:
    """Prints for people: on stderr where stdout carries JSON."""
    click.echo(text, err=json_path == "-")


def split_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def open_data(path: Path, spec: ModelSpec, meta: dict[str, Any], name: str | None, tokenizer: Path | None) -> Any:
    """The data to evaluate a model on: its own unless said otherwise, with its own tokenizer. Raises SpecError where they
    are gone, or another tokenizer's."""
    need_tokenizer(path, spec, meta)
    about = meta.get("data", {})
    source = about.get("source") if name is None else name
    if name is None and source not in (None, "books", "digits") and not Path(source).exists():
        raise SpecError(f"{path} has its data from {source}, which is not there now: say where with --data")
    own = {"length": about.get("length"), "names": about.get("names"), "scaling": meta.get("images")}
    data = load(source, spec, tokenizer=tokenizer or meta.get("tokenizer"), **own)
    check_tokenizer(path, meta, data)
    return data


def need_tokenizer(path: Path, spec: ModelSpec, meta: Mapping[str, Any]) -> None:
    """Raises SpecError for an imported model of text without the tokenizer that its token ids are of."""
    if spec.family is not Family.VIT and "hub" in meta and not meta.get("tokenizer"):
        raise SpecError(
            f"{path} is a model whose import found no tokenizer.json: import it again with one in its folder"
        )


def check_tokenizer(path: Path, meta: Mapping[str, Any], data: Dataset) -> None:
    """Raises SpecError where data are not read with the tokenizer of a checkpoint's own."""
    trained_with = meta.get("data", {}).get("tokenizer_sha256")
    given = data.describe().get("tokenizer_sha256")
    if trained_with != given:
        raise SpecError(
            f"tokenizer {given and given[:12]} is not the one of {path} ({trained_with and trained_with[:12]})"
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint that holds a model. Raises CheckpointError where it cannot be read, or its training diverged."""
    checkpoint = load_checkpoint(path)
    if "diverged_at" in checkpoint.meta:
        raise CheckpointError(
            f"{path}: training diverged at step {checkpoint.meta['diverged_at']}; no model is left to use"
        )
    return checkpoint


def float_model(checkpoint: Checkpoint, machine: Machine) -> Any:
    """The checkpoint's model in float, with the transforms for which its parameters are made."""
    model = machine.model(checkpoint.spec, checkpoint.params)
    model.bind({}, {}, transforms=checkpoint.transforms)
    return model


def is_artifact(path: Path) -> bool:
    """Whether a name stands for integers. What the file then is, its content says, and a wrong name is refused."""
    return path.suffix == SUFFIX


@dataclass(frozen=True)
class Opened:
    """A model as a command runs it, where it came from, data to run it on, and what it is in words."""

    found: Checkpoint | Artifact
    model: Any
    data: Any
    numerics: str
    integer: bool = False
    note: str = ""

    @property
    def scored(self) -> Any:
        """What `quantization.evaluate` takes."""
        return quantization.IntegerScorer(self.model) if self.integer else self.model


def open_model(
    path: Path, machine: Machine, data_name: str | None = None, tokenizer: Path | None = None, *,
    recipe_name: str | None = None, numerics: str | None = None, strict: bool = False, split: str | None = None,
    check: Callable[[Checkpoint | Artifact], None] = lambda found: None,
) -> Opened:  # fmt: skip
    """A checkpoint in float or under a recipe, or an artifact in integers or fake quantization; data of `split` are
    compared with those it was trained and calibrated on.

    check: refuses a file that the command cannot use, before any data are read.

    Raises:
        SpecError, CheckpointError, DataError, MissingExtra: a file, data, or an option that does not belong to it.
    """
    if not is_artifact(path):
        if numerics or strict:
            raise SpecError(f"--numerics and --strict belong to a MODEL{SUFFIX}; make one with qtx quantize")
        found = open_checkpoint(path)
        chosen = recipe_of(found, recipe_name)
        check(found)
        data = open_data(path, found.spec, found.meta, data_name, tokenizer)
        if split:
            quantization.refuse_overlap(found.meta, data, split)
        model = model_under(found, machine, data, chosen)
        return Opened(found, model, data, "float" if chosen is None else chosen.name)
    if recipe_name is not None:
        raise SpecError(f"--recipe {recipe_name}: {path} has its own; leave it out")
    found, kind = load_artifact(path), numerics or "integer"
    check(found)
    model = artifact_model(found, machine, kind, strict)
    data = open_data(path, found.spec, found.meta, data_name, tokenizer)
    if split:
        quantization.refuse_overlap(found.meta, data, split)
    words = f"{kind}{', strict' if strict else ''}, {found.recipe.name}, profile {found.profile.name}"
    return Opened(found, model, data, words, kind == "integer", head_note(found))


def need_head(path: Path, spec: ModelSpec) -> None:
    """Raises SpecError where a model has no head, and so no words or classes to tell."""
    if spec.head is Head.NONE:
        raise SpecError(f"{path} has no head: it can be analyzed and compared, not evaluated or asked for words")


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
    """What becomes of a language model's last linear where the recipe leaves its weights or its result in float."""
    quants, order = artifact.quants, sites(artifact.spec).results
    own, result = "head.decoder.weight" in quants, "head.decoder" in quants
    if artifact.spec.head not in (Head.MLM, Head.CAUSAL) or (own and result):
        return ""
    name = "head.decoder.weight" if own else "embed.token.weight"
    weight = quants[name]
    codes = f"{'int' if weight.symmetric else 'uint'}{weight.bits}"
    part = "whose result" if own else "whose weights" if result else "which"
    note = f"head.decoder, {part} recipe {artifact.recipe.name} leaves in float, multiplies the {codes} codes of {name}"
    if result:
        return note
    entering = quants.get("head.decoder.input", quants.get(order[order.index("head.decoder") - 1]))
    return f"{note}; its int{accumulator_bits(entering, weight)} accumulators are the output"


def recipe_of(checkpoint: Checkpoint, recipe_name: str | None) -> Recipe | None:
    """The recipe that a checkpoint is run under: its own, or the one of that name; None for float. Raises SpecError for one
    that does not exist, or does not fit the model."""
    if recipe_name == "float" or (recipe_name is None and checkpoint.recipe is None):
        return None
    if recipe_name is None:
        return checkpoint.recipe
    chosen = recipes.recipe(recipe_name, checkpoint.spec)
    recipes.resolve(chosen, checkpoint.spec)
    refuse_transformed(checkpoint, f"recipe {chosen.name}")
    return chosen


def model_under(checkpoint: Checkpoint, machine: Machine, data: Any, chosen: Recipe | None) -> Any:
    """The model that a checkpoint is run as: in float, under its own recipe, or under another, calibrated here."""
    if chosen is not None and chosen is not checkpoint.recipe:
        return prepared_anew(checkpoint, machine, data, chosen).model(machine, checkpoint.spec, chosen)
    model = float_model(checkpoint, machine)
    if chosen is not None:
        quantization.bind(model, chosen, checkpoint.ranges, checkpoint.transforms)
    return model


def refuse_transformed(checkpoint: Checkpoint, what: str) -> None:
    """Raises SpecError where the parameters are made for transforms, without which they are another model."""
    if checkpoint.transforms:
        raise SpecError(
            f"{what}: the checkpoint's weights are made for the transforms of {checkpoint.recipe.name}; take the float "
            "checkpoint that it was made from"
        )


def prepared_anew(checkpoint: Checkpoint, machine: Machine, data: Any, chosen: Recipe) -> quantization.Prepared:
    """A checkpoint's parameters under a recipe, from its calibration data. Raises SpecError where the parameters are made
    for transforms of another recipe, and for data that the checkpoint knows from another split."""
    refuse_transformed(checkpoint, f"recipe {chosen.name}")
    quantization.refuse_overlap(checkpoint.meta, data, "calibration")
    batches = quantization.calibration(data, checkpoint.spec)
    return quantization.prepare(machine, checkpoint.spec, checkpoint.params, batches, chosen)
