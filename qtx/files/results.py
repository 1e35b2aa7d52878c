"""Results read back, `study.json` and `ptq.json`: what they must hold before a command goes on with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypedDict, cast

from .container import COMPARISON, STUDY, FileError, read_sealed_json
from .formats import JsonObject

LARGEST = 2**63  # of whole numbers
RUNS_AS = ("float", "integers", "simulation", "failed")
WAYS = {"runs_as": f"one of {', '.join(RUNS_AS)}"}
MEASURED = dict.fromkeys(("value", "loss", "difference", "low", "high", "ms"), "a number or null")
ROW = MEASURED | WAYS | {"bytes": "a whole number or null", "worst": "a list of sites and numbers"}
SCORES = ("loss", "perplexity", "accuracy", "max_inf_norm", "average_kurtosis")
RUN = {
    "attention": "a text",
    "checkpoint": "a text",
    "diverged": "true or false",
    "float": "scores or null",
    "outliers": "scores or null",
    "trained": "scores or null",
    "recipes": "an object",
    "watch": "an object",
}


class Measurement(TypedDict):
    """A pass over the evaluation data. A number that is not finite is None."""

    value: float | None  # accuracy in percent, or perplexity
    loss: float | None  # nats
    difference: float | None  # to float: points of accuracy, or percent of perplexity
    low: float | None  # ends of its interval
    high: float | None
    ms: float | None  # of a sequence


class Difference(TypedDict):
    """Of two losses, nats, with the ends of its interval."""

    nats: float
    low: float
    high: float


class Damage(TypedDict):
    """What quantization adds to the loss, and the part of it that belongs to spared tokens; None where there is none to
    give."""

    whole: Difference | None
    part: Difference | None


class RecipeRow(Measurement, total=False):
    """A recipe's row of ptq.json: `runs_as`, `bytes` and `worst` always."""

    runs_as: str  # one of RUNS_AS
    bytes: int | None
    worst: list[tuple[str, float]]  # sites and their errors
    simulated: Measurement  # where the row's own is of integers
    prepare_seconds: float
    spared: Measurement  # simulated, with the activations of some tokens in float
    damage: Damage  # of the simulation
    why: str  # it was not measured in integers


class SiteRow(Measurement):
    """What quantizing one site alone costs."""

    site: str


class ComparisonRecord(TypedDict):
    """What `qtx ptq` writes."""

    of: JsonObject  # what was compared
    metric: str
    rows: dict[str, RecipeRow]  # by recipe
    sensitivity: dict[str, list[SiteRow]]  # by recipe


def read_comparison(path: Path, metric: str, recipes: Collection[str]) -> ComparisonRecord:
    """What `qtx ptq` wrote.

    Raises FileError where a value that is shown or gone on with is not of its kind, the metric is another than
    `metric`, or a row is of a recipe other than `recipes` and float.
    """

    def check(content: JsonObject) -> None:
        kinds = {"of": "an object", "metric": "a text", "rows": "an object", "sensitivity": "an object"}
        expect_all(path, "", content, kinds)
        if content["metric"] != metric:
            raise FileError(f"{path} is another comparison: its metric is not {metric}")
        for name, row in content["rows"].items():
            if name not in ("float", *recipes):
                raise FileError(f"{path} has a row of {name}, which is not among the recipes compared")
            check_row(path, f"rows.{name}", row)
        for name, sites in content["sensitivity"].items():
            expect(path, f"sensitivity.{name}", sites, "a list")
            for entry in sites:
                expect_all(path, f"sensitivity.{name}", entry, {"site": "a text"} | MEASURED)

    return cast(ComparisonRecord, read_sealed_json(path, COMPARISON, check))


def check_row(path: Path, where: str, value: object) -> None:
    """Raises FileError where a recipe's row is not what `qtx ptq` makes."""
    row = expect_all(path, where, value, ROW)
    for key in ("simulated", "spared"):
        if key in row:
            expect_all(path, f"{where}.{key}", row[key], MEASURED)
    if "damage" in row:
        expect_all(path, f"{where}.damage", row["damage"], dict.fromkeys(("whole", "part"), "a difference or null"))
    if "why" in row or row["runs_as"] == "failed":
        expect(path, f"{where}.why", row.get("why"), "a text")


def read_study(path: Path) -> JsonObject:
    """What `qtx study` wrote. Raises FileError where a value that is shown or gone on with is not of its kind."""

    def check(content: JsonObject) -> None:
        expect_all(path, "", content, {"spec": "an object", "runs": "an object"})
        for name, run in content["runs"].items():
            expect_all(path, f"runs.{name}", run, RUN)
            if run["checkpoint"] != (file := f"{name}/model.safetensors"):
                raise FileError(f"{path} is not what qtx wrote: runs.{name}.checkpoint must be {file}")
            expect(path, f"runs.{name}.integers", run.get("integers", {}), "an object")  # not before 0.3
            expect(path, f"runs.{name}.sinks", run.get("sinks"), "sinks or null")
            for way in ("recipes", "integers"):
                for recipe, scores in run.get(way, {}).items():
                    expect(path, f"runs.{name}.{way}.{recipe}", scores, "scores or null")

    return read_sealed_json(path, STUDY, check)


def expect_all(path: Path, where: str, value: object, kinds: Mapping[str, str]) -> JsonObject:
    """The value, an object whose keys are of these kinds. Raises FileError unless it is one."""
    expect(path, where or "the file", value, "an object")
    content = cast(JsonObject, value)
    for key, kind in kinds.items():
        expect(path, f"{where}.{key}".removeprefix("."), content.get(key, MISSING), kind)
    return content


def expect(path: Path, where: str, value: object, kind: str) -> None:
    """Raises FileError unless `value`, which stands at `where`, is of this kind, one of `KINDS`."""
    if not KINDS[kind](value):
        raise FileError(f"{path} is not what qtx wrote: {where} must be {kind}; remove it and measure again")


def is_finite(value: object) -> bool:
    """Whether a JSON value is a number that arithmetic can take."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_whole(value: object) -> bool:
    """Whether a JSON value is a whole number that 64 bits hold."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST


def is_score(value: object) -> bool:
    """Whether a JSON value is null, or an object whose numbers for the table are numbers or null."""
    return value is None or (
        isinstance(value, dict) and all(value.get(key) is None or is_finite(value[key]) for key in SCORES)
    )


def is_sinks(value: object) -> bool:
    """Whether a JSON value is null, or what a study keeps of its heads."""
    return value is None or (
        isinstance(value, dict)
        and isinstance(value.get("mass"), dict)
        and all(map(is_table, (*value["mass"].values(), value.get("reasons"))))
        and all(is_finite(one) for table in value["mass"].values() for heads in table for one in heads)
        and is_whole(value.get("idle"))
        and is_whole(value.get("heads"))
    )


def is_table(value: object) -> bool:
    """Whether a JSON value is a list of lists, none of them empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, list) and row for row in value)


def is_difference(value: object) -> bool:
    """Whether a JSON value is null, or a difference of losses with its interval."""
    return value is None or (
        isinstance(value, dict) and all(is_finite(value.get(key)) for key in ("nats", "low", "high"))
    )


def is_error(value: object) -> bool:
    """Whether a JSON value is a pair of a site and its error."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and is_finite(value[1])


MISSING = object()
KINDS: dict[str, Callable[[object], bool]] = {
    "an object": lambda value: isinstance(value, dict),
    "a list": lambda value: isinstance(value, list),
    "a text": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "a number or null": lambda value: value is None or is_finite(value),
    "a whole number or null": lambda value: value is None or is_whole(value),
    "scores or null": is_score,
    "sinks or null": is_sinks,
    "a difference or null": is_difference,
    "a list of sites and numbers": lambda value: isinstance(value, list) and all(map(is_error, value)),
    WAYS["runs_as"]: lambda value: value in RUNS_AS,
}
