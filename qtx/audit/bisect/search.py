"""The first tensor in which two executions differ on equal inputs, the rule that does it, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from qtx_ref.spec import QTX, Profile

from ...engines.process import EngineCrash, EngineRefusal
from .executions import ArtifactExecution, Execution, Trace
from .rules import differing_fields, list_levels, take_fields

__all__ = ["Axis", "Bisection", "Part", "bisect"]

Arrays = Mapping[str, np.ndarray]
MOST = 3  # fields that together make a difference
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
    first tensor, of two artifacts; `fits`: of either execution, how many tensors its rule reproduces, of how many."""

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
    found.constants = list_constants(a, b, target)
    kernels = sorted({*a.list_kernels(target), *b.list_kernels(target)})
    if one.tensors[target].dtype.kind == "f":
        found.unexplained = "floats differ, and no code does"
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
    if found.constants and any(not differing_fields(x.profile, y.profile) for x, y in pairs):
        return  # the same rule on other constants
    pairs = [(x, y) for x, y in pairs if differing_fields(x.profile, y.profile)]
    if not pairs:
        found.unexplained = f"one rule makes {target} in both: their inputs differ in a tensor that is not compared"
        return
    pairs.sort(
        key=lambda pair: (-pair[0].equal - pair[1].equal, len(differing_fields(pair[0].profile, pair[1].profile)))
    )
    best = pairs[0]
    found.fits = {label: (fit.equal, fit.count) for label, fit in zip("ab", best, strict=True)}
    score = best[0].equal + best[1].equal
    rules: list[list[Axis]] = []
    for x, y in pairs:
        if x.equal + y.equal == score:
            rules += shrink(a, one, inputs, x.profile, y.profile, target, other.tensors[target])
    rules = sorted((rule for i, rule in enumerate(rules) if rule not in rules[:i]), key=len)
    found.axes, found.rivals = rules[0], [rule for rule in rules[1:] if len(rule) == len(rules[0])]


def shrink(
    execution: Execution, trace: Trace, inputs: Arrays, x: Profile, y: Profile, target: str, wanted: np.ndarray
) -> list[list[Axis]]:
    """The fewest fields of y that, in x, make what y makes of the target; all of them where none do so by fewer."""
    differing = differing_fields(x, y)
    for size in range(1, len(differing)):
        enough = []
        for keys in combinations(differing, size):
            candidate = take_fields(x, y, keys)
            made = None if candidate is None else replay(execution, candidate, inputs, trace.tensors, target)
            if made is not None and same(made, wanted):
                enough.append([Axis(key, *differing[key]) for key in keys])
        if enough or size == MOST:
            return enough or [[Axis(key, *values) for key, values in differing.items()]]
    return [[Axis(key, *values) for key, values in differing.items()]]


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


def list_constants(a: Execution, b: Execution, target: str) -> list[str]:
    """The constants of a site that two artifacts have in different values."""
    if not (isinstance(a, ArtifactExecution) and isinstance(b, ArtifactExecution)):
        return []
    site = target.removesuffix(".accumulator")
    ones, others = a.artifact.constants, b.artifact.constants
    names = [name for name in dict.fromkeys((*ones, *others)) if name.rpartition(".")[0].startswith(site)]
    if a.artifact.profile != b.artifact.profile:  # which make multipliers, shifts and biases of their own
        names = [name for name in names if not name.endswith((".multiplier", ".shift", ".bias", ".bias.scale"))]
    return [n for n in names if n not in ones or n not in others or not np.array_equal(ones[n], others[n])]
