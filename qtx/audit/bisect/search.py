"""The first tensor in which two executions differ on equal inputs, the rule that does it, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from qtx_ref.spec import QTX, Profile

from ...engines.process import EngineCrash, EngineRefusal
from .artifacts import ArtifactExecution
from .execution import Execution, Trace
from .rules import differing_fields, list_levels, take_fields

__all__ = ["Axis", "Bisection", "Part", "bisect"]

Arrays = Mapping[str, np.ndarray]
MOST = 3  # fields that together make a difference
KIND = "requantize"  # the field that says of which kind that record is
LIMIT = 24  # profiles that explain a tensor and are held to the others


@dataclass(frozen=True)
class Part:
    """A tensor that differs: how many of its values, and by how much at most; floats count where their bits differ."""

    name: str
    differing: int
    size: int
    largest: float


@dataclass(frozen=True)
class Axis:
    """A field of the vocabulary, and what it is in either execution."""

    field: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Fit:
    """A profile that reproduces a tensor, and of how many others it reproduces: each fed the execution's own."""

    profile: Profile
    equal: int
    count: int


@dataclass
class Bisection:
    """Where two executions part. `axes`: the rule, empty where none was found; `constants`: those that differ at the
    first tensor, of two files of one kind; `fits`: of either, how many tensors its rule reproduces, of how many."""

    a: str
    b: str
    compared: int
    first: Part | None = None
    operation: str = ""
    example: dict[str, Any] = field(default_factory=dict)
    axes: list[Axis] = field(default_factory=list)
    rivals: list[list[Axis]] = field(default_factory=list)  # other rules that explain it as well
    constants: list[str] = field(default_factory=list)
    fits: dict[str, tuple[int, int]] = field(default_factory=dict)
    unexplained: str = ""
    growth: list[Part] = field(default_factory=list)
    predictions: tuple[int, int] | None = None  # differing, of how many
    changed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unseen: dict[str, tuple[str, ...]] = field(default_factory=dict)


def bisect(a: Execution, b: Execution, inputs: Arrays) -> Bisection:
    """Runs both and compares what both have, in the order of the first. Raises what they raise."""
    one, other = (run(execution, inputs) for execution in (a, b))
    names = [name for name in one.tensors if name in other.tensors and is_alike(one.tensors[name], other.tensors[name])]
    found = Bisection(a.label, b.label, len(names))
    for label, trace in (("a", one), ("b", other)):
        if trace.changed:
            found.changed[label] = trace.changed
        if trace.unseen:
            found.unseen[label] = trace.unseen
    found.growth = [part for name in names if (part := compare(name, one.tensors[name], other.tensors[name]))]
    found.predictions = count_predictions(one, other)
    if not found.growth:
        return found
    # floats may differ in bits before a code does, and are no codes: the first integers that differ, if any
    codes = [p for p in found.growth if one.tensors[p.name].dtype.kind in "iub"]
    found.first = (codes or found.growth)[0]
    target = found.first.name
    found.operation = a.operation(target)
    found.example = take_example(one.tensors[target], other.tensors[target])
    explain(found, a, b, one, other, inputs)
    return found


def run(execution: Execution, inputs: Arrays) -> Trace:
    """The tensors of one execution. Raises what it raises; an engine's end with its name."""
    try:
        return execution.run(inputs)
    except (EngineCrash, EngineRefusal) as error:
        raise type(error)(f"{execution.label}: {error}") from None


def is_alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether both are codes or both are floats: an output may be accumulators in one file and logits in another."""
    return (a.dtype.kind == "f") == (b.dtype.kind == "f")


def compare(name: str, a: np.ndarray, b: np.ndarray) -> Part | None:
    """How two tensors differ; None where they are equal in every value."""
    if a.shape != b.shape:
        if a.size != b.size:
            return Part(name, max(a.size, b.size), max(a.size, b.size), float("nan"))
        b = b.reshape(a.shape)
    differs = (a != b) & ~((a != a) & (b != b))
    if not differs.any():
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.nanmax(np.abs(a.astype(np.float64) - b.astype(np.float64))[differs])
    return Part(name, int(differs.sum()), a.size, float(largest))


def take_example(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """The first value that differs."""
    if a.size != b.size:
        return {"shape_a": list(a.shape), "shape_b": list(b.shape)}
    at = int(np.flatnonzero(np.ravel(a) != np.ravel(b))[0])
    index = [int(i) for i in np.unravel_index(at, a.shape)]
    return {"index": index, "a": np.ravel(a)[at].item(), "b": np.ravel(b)[at].item()}


def count_predictions(one: Trace, other: Trace) -> tuple[int, int] | None:
    """Rows of the first output whose largest value is elsewhere; None without an output of several values a row."""
    a, b = (trace.tensors.get(next(iter(trace.outputs), "")) for trace in (one, other))
    if a is None or b is None or a.shape != b.shape or a.ndim < 2 or a.shape[-1] < 2:
        return None
    rows = a.argmax(-1) != b.argmax(-1)
    return int(rows.sum()), rows.size


# --- the cause --------------------------------------------------------------------------------------------------------


def explain(found: Bisection, a: Execution, b: Execution, one: Trace, other: Trace, inputs: Arrays) -> None:
    """Fills in the rules, or why there are none."""
    assert found.first is not None
    target = found.first.name
    found.constants = list_constants(a, b, target, one, other)
    kernels = sorted({*a.list_kernels(target), *b.list_kernels(target)})
    floats = one.tensors[target].dtype.kind == "f"
    if found.constants and (floats or kernels):
        return  # no rule is asked for; constants that differ are enough
    if floats:
        codes = any(one.tensors[name].dtype.kind in "iub" for name in one.tensors if name in other.tensors)
        found.unexplained = f"floats differ, and no code does{'' if codes else ': none is in both'}"
        return
    if a.simulated is not b.simulated:
        found.unexplained = "one is in integers, the other rounds the float result of the same operation"
        return
    if kernels:
        found.unexplained = f"it is made by float kernels of an engine: {', '.join(kernels)}"
        return
    base = a.profile or b.profile or QTX
    fits = {}
    for label, execution, trace in (("a", a, one), ("b", b, other)):
        wanted = trace.tensors[target]
        fits[label] = list(find_fits(execution, trace, inputs, target, execution.profile or base))
        if not fits[label]:
            known = replay(execution, base, inputs, trace.tensors, target)
            what = "no rule of the vocabulary makes" if known is not None else "qtx_ref does not have what makes"
            found.unexplained = f"{what} the {wanted.size} values of {target} in {execution.label}"
            return
    pairs = [(x, y) for x in fits["a"] for y in fits["b"]]
    stated = [find_stated(execution, trace, inputs, target) for execution, trace in ((a, one), (b, other))]
    if stated[0] is not None and stated[1] is not None:  # what is known of engines goes before what fits as well
        pairs.insert(0, (stated[0], stated[1]))
    if found.constants and any(not differing_fields(x.profile, y.profile) for x, y in pairs):
        return  # the same rule on other constants
    pairs = [(x, y) for x, y in pairs if differing_fields(x.profile, y.profile)]
    if not pairs:
        found.unexplained = (
            f"one rule makes {target} in both: what it is made of differs in a tensor that is not compared"
        )
        return
    pairs = [pair for pair in pairs if is_cause(a, one, inputs, pair[1].profile, target, other.tensors[target])]
    if not pairs:  # B's rules do not make in A what they make in B
        if not found.constants:
            found.unexplained = f"no rule alone: what {target} is made of differs in a tensor that is not compared"
        return
    score = max(x.equal + y.equal for x, y in pairs)
    rules: list[tuple[int, list[Axis]]] = []
    for x, y in pairs:
        if x.equal + y.equal == score:
            found.fits = found.fits or {"a": (x.equal, x.count), "b": (y.equal, y.count)}
            rules += shrink(a, one, inputs, x.profile, y.profile, target, other.tensors[target])
    fewest = min(size for size, _ in rules)
    axes = [axes for size, axes in rules if size == fewest]
    found.axes, *found.rivals = [some for i, some in enumerate(axes) if some not in axes[:i]]


def shrink(
    execution: Execution, trace: Trace, inputs: Arrays, x: Profile, y: Profile, target: str, wanted: np.ndarray
) -> list[tuple[int, list[Axis]]]:
    """The fewest fields of y that, in x, make what y makes of the target, and how many they are; all of them where none
    do so by fewer. A requantization of another kind is one change of many fields."""
    differing = differing_fields(x, y)
    kind = [key for key in differing if key.partition(".")[0] == KIND] if KIND in differing else []
    units = [[key] for key in differing if key not in kind] + ([kind] if kind else [])
    for size in range(1, min(MOST, len(units) - 1) + 1):
        enough = []
        for some in combinations(units, size):
            candidate = take_fields(x, y, sum(some, []))
            made = None if candidate is None else replay(execution, candidate, inputs, trace.tensors, target)
            if made is not None and same(made, wanted):
                enough.append(name_axes(some, differing))
        if enough:
            return enough
    return [name_axes(units, differing)]


def name_axes(units: Sequence[list[str]], differing: Mapping[str, tuple[Any, Any]]) -> tuple[int, list[Axis]]:
    """How many fields units are, and each unit as an axis; that of another kind of requantization with its fields."""
    axes = [Axis(unit[0], *differing[unit[0]]) for unit in units if unit[0] != KIND]
    for unit in units:
        if unit[0] == KIND:
            axes.append(Axis(KIND, *(spell_kind([(key, differing[key][side]) for key in unit]) for side in (0, 1))))
    return sum(map(len, units)), axes


def spell_kind(fields: Sequence[tuple[str, Any]]) -> str:
    """`Fixed (bits 31, product exact, ...)`."""
    (_, kind), *rest = fields
    return f"{kind} ({', '.join(f'{key[len(KIND) + 1 :]} {value}' for key, value in rest if value is not None)})"


def is_cause(
    execution: Execution, trace: Trace, inputs: Arrays, other: Profile, target: str, wanted: np.ndarray
) -> bool:
    """Whether the other's rules make the other's target of this execution's tensors too; so they do where this
    execution cannot be had under them."""
    made = replay(execution, other, inputs, trace.tensors, target)
    return made is None or same(made, wanted)


def find_stated(execution: Execution, trace: Trace, inputs: Arrays, target: str) -> Fit | None:
    """The profile by which an execution computes, or which states its engine's rules, where it makes the target."""
    stated = execution.profile or execution.find_stated()
    made = None if stated is None else replay(execution, stated, inputs, trace.tensors, target)
    if stated is None or made is None or not same(made, trace.tensors[target]):
        return None
    return score(execution, stated, inputs, trace)


def find_fits(execution: Execution, trace: Trace, inputs: Arrays, target: str, base: Profile) -> Iterator[Fit]:
    """The profiles nearest to `base` that make the target of an execution's own tensors."""
    for level in list_levels(base):
        some = []
        for candidate in level:
            made = replay(execution, candidate, inputs, trace.tensors, target)
            if made is not None and same(made, trace.tensors[target]):
                some.append(candidate)
        for candidate in some[:LIMIT]:
            yield score(execution, candidate, inputs, trace)
        if some:
            return


def replay(execution: Execution, profile: Profile, inputs: Arrays, given: Arrays, target: str) -> np.ndarray | None:
    """The target under a profile; None where it cannot be made."""
    try:
        return execution.replay(profile, inputs, given, target).get(target)
    except ValueError:  # SpecError is one
        return None


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors have the same values, in whatever shape and integer dtype."""
    return a.size == b.size and bool(np.array_equal(np.ravel(a), np.ravel(b), equal_nan=a.dtype.kind == "f"))


def score(execution: Execution, profile: Profile, inputs: Arrays, trace: Trace) -> Fit:
    """Of how many of an execution's tensors a profile makes the same values."""
    try:
        made = execution.replay(profile, inputs, trace.tensors)
    except ValueError:
        return Fit(profile, 0, 0)
    names = [name for name in made if name in trace.tensors and trace.tensors[name].dtype.kind in "iub"]
    return Fit(profile, sum(same(made[name], trace.tensors[name]) for name in names), len(names))


def list_constants(a: Execution, b: Execution, target: str, one: Trace, other: Trace) -> list[str]:
    """The constants behind a tensor that two files of one kind have in different values."""
    if type(a) is not type(b):
        return []
    behind = (*a.list_constants(target, one.tensors), *b.list_constants(target, other.tensors))
    names = list(dict.fromkeys(behind))
    if isinstance(a, ArtifactExecution) and a.profile != b.profile:  # which make these of their own
        names = [name for name in names if not name.endswith((".multiplier", ".shift", ".bias", ".bias.scale"))]
    ones, others = a.constants, b.constants
    return [n for n in names if n not in ones or n not in others or not np.array_equal(ones[n], others[n])]
