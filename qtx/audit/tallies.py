"""One path of an engine beside `qtx_ref` under the profile that states it, counted family by family of vectors.

A mismatch is a code that differs, or a call that the engine answers and the profile refuses. What the engine refuses is
counted apart; a crash or a hang too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qtx_ref.profiles import profile as load_profile
from qtx_ref.spec import Bias, Profile, SpecError

from ..engines.paths import EngineCrash, EngineRefusal, Path, multiplies_bytes, name_profile
from .known import Known
from .reference import EVALUATED, evaluate
from .vectors import Batch
from .vectors_numbers import step

__all__ = ["Run", "Tally", "check_path", "compare", "prepare"]

Run = Callable[[Path, str, Mapping[str, Any]], dict[str, np.ndarray]]


@dataclass
class Tally:
    """One family of vectors on one path."""

    path: str
    op: str
    profile: str
    family: str
    vectors: int = 0
    mismatches: int = 0
    worst: int = 0  # codes, or units in the last place
    witness: dict[str, Any] | None = None  # the first mismatch
    refused: int = 0  # vectors that the engine, and not the profile, refuses
    refusal: str = ""  # its words for the first
    crashes: int = 0
    crash: str = ""
    findings: list[str] = field(default_factory=list)  # what explains them
    unexplained: int = 0  # mismatches and crashes that nothing explains

    @property
    def clean(self) -> bool:
        """Whether there is nothing to explain."""
        return not (self.mismatches or self.crashes)

    def explain(self, finding: str) -> None:
        """Notes a finding, once."""
        if finding not in self.findings:
            self.findings.append(finding)


# --- comparing --------------------------------------------------------------------------------------------------------


def order(x: np.ndarray) -> np.ndarray:
    """Integers, or floats as integers in which neighbours are 1 apart, both zeros are 0, and all NaN are one."""
    if x.dtype.kind in "iu":
        return x.astype(np.int64)
    size = x.dtype.itemsize
    bits = x.view(f"i{size}").astype(np.int64)
    bits = np.where(bits < 0, -(bits & (2 ** (8 * size - 1) - 1)), bits)
    return np.where(np.isnan(x), 2 ** (8 * size - 1), bits)


def compare(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> tuple[np.ndarray, int]:
    """Where results differ, and by how much at most. Results of another shape differ everywhere."""
    differs, worst = np.zeros((), bool), 0
    for name, expected in want.items():
        given = np.asarray(got[name])
        if given.shape != expected.shape:
            return np.ones(expected.shape if expected.size else (), bool), 0
        if expected.dtype.kind == "f" and given.dtype.kind == "f" and given.dtype != expected.dtype:
            given = given.astype(expected.dtype)
        distance = np.abs(order(given) - order(expected))
        differs = differs | (distance > 0)
        worst = max(worst, int(distance.max(initial=0)))
    return differs, worst


def prepare(batch: Batch, path: Path, profile: Profile) -> dict[str, Any]:
    """What a batch gives to a path: its bias, whole numbers in units of the accumulator, in the path's own kind; scales
    of w for each column, where the path's name says so; the rule for scales of blocks, with which it ends."""
    values = dict(batch.values)
    if path.op == "mx":
        values["shared"] = path.name.rpartition("-")[2]
    channels = path.name.endswith("-channel")
    if channels and path.op in ("quantize", "dequantize") and "axis" not in values:  # two equal ones
        name = "x" if path.op == "quantize" else "code"
        values |= {key: np.repeat(values[key], 2) for key in ("scale", "zero_point")} | {"axis": 0}
        values[name] = np.stack([values[name]] * 2)
    if channels and path.op == "linear" and np.ndim(values["w_scale"]) == 0:
        columns = np.arange(values["w"].shape[1])
        ulps = columns % 5 - 2 if batch.family == "near ties" else 0 * columns
        values["w_scale"] = step(np.full(columns.size, values["w_scale"], np.float32), ulps)
        values["w_zero"] = np.full(columns.size, values["w_zero"])
    if values.get("bias") is not None and profile.bias is not Bias.INT32:
        unit = np.float64(values["x_scale"]) * np.float64(values["w_scale"])
        values["bias"] = (values["bias"] * unit).astype(np.float32)
    return values


def show(value: Any) -> Any:
    """A number as JSON has it: a float that is none of JSON's as text."""
    value = value.item() if hasattr(value, "item") else value
    return value if not isinstance(value, float) or np.isfinite(value) else str(value)


def make_witness(
    values: Mapping[str, Any], differs: np.ndarray, got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The first place where results differ: what is said of it alone, and both results."""
    place = tuple(int(i) for i in np.argwhere(differs)[0]) if differs.size and differs.ndim else ()
    witness: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(value, np.ndarray):
            witness[name] = value
        elif value.ndim == 0:
            witness[name] = show(value)
        elif "w" in values and name in ("x", "w") and len(place) == 2:
            line = value[place[0]] if name == "x" else value[:, place[1]]
            witness[name] = line.tolist() if line.size <= 64 else f"{line.size} codes"
        elif value.shape == differs.shape:
            witness[name] = show(value[place])
        elif value.ndim == 1 and place:
            witness[name] = show(value[place[values.get("axis", -1)]])
    sides = (("got", got), ("want", want))
    for side, results in sides:
        at = {name: np.asarray(array) for name, array in results.items()}
        witness[side] = {
            name: show(array[place]) if array.shape == differs.shape else f"shape {array.shape}"
            for name, array in at.items()
        }
    return witness


def expect(path: Path, profile: Profile, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the profile says, and of the elements that do not fill the path's vectors another. Raises ValueError for
    what a profile refuses."""
    want = evaluate(profile, path.op, values)
    if not path.tail or "axis" in values:
        return want
    rest = evaluate(load_profile(path.tail), path.op, values)
    for name, array in want.items():
        start = array.size - array.size % path.lanes
        want[name] = np.concatenate([array.reshape(-1)[:start], rest[name].reshape(-1)[start:]]).reshape(array.shape)
    return want


def judge(tally: Tally, batch: Batch, path: Path, profile: Profile, run: Run, known: Sequence[Known]) -> None:
    """Runs one batch on both sides, counts it and explains it."""
    values, op = prepare(batch, path, profile), path.op
    tally.vectors += batch.count
    known = [one for one in known if one.explains(path.name, op, batch.family, batch.dtype)]
    whole = next((one.finding for one in known if one.profile is None), None)
    try:
        got = run(path, op, values)
    except EngineRefusal as refusal:
        tally.refused += batch.count
        tally.refusal = tally.refusal or str(refusal)
        return
    except EngineCrash as crash:
        tally.crashes += 1
        tally.crash = tally.crash or str(crash)
        note(tally, 1, {name: show(value) for name, value in values.items() if np.ndim(value) == 0}, whole)
        return
    try:
        want = expect(path, profile, values)
    except ValueError as refusal:
        tally.mismatches += max(batch.count, 1)
        said = {"dtype": batch.dtype, "profile refuses": str(refusal)[:300]}
        note(tally, max(batch.count, 1), said, whole)
        return
    differs, worst = compare(got, want)
    tally.worst = max(tally.worst, worst)
    tally.mismatches += int(differs.sum())
    left = differs
    for one in known if differs.any() else ():
        if one.profile is not None:
            still = left & differ_from(one.profile, got, op, values)
            if still.sum() < left.sum():
                tally.explain(one.finding)
            left = still
    if differs.any():
        note(tally, int(left.sum()), make_witness(values, left if left.any() else differs, got, want), whole)


def differ_from(other: str, got: Mapping[str, np.ndarray], op: str, values: Mapping[str, Any]) -> np.ndarray:
    """Where results differ from those of another profile: everywhere, where it refuses."""
    try:
        return compare(got, evaluate(load_profile(other), op, values))[0]
    except ValueError:
        return np.ones((), bool)


def note(tally: Tally, left: int, witness: dict[str, Any], whole: str | None) -> None:
    """Keeps the first witness, of what nothing explains where there is any. left: so much is explained by `whole`, a
    finding, or by none."""
    if left and whole is not None:
        tally.explain(whole)
        left = 0
    if tally.witness is None or (left and not tally.unexplained):
        tally.witness = witness
    tally.unexplained += left


def check_path(
    path: Path,
    batches: Iterable[Batch],
    run: Run,
    known: Sequence[Known] = (),
    profile: Profile | None = None,
    cpu: str | None = None,
    tell: Callable[[int], None] | None = None,
) -> list[Tally]:
    """A path's rows, a family each, on a CPU. `tell`: is told of every batch. Raises SpecError for a profile or an
    operation that there is none of."""
    if path.op not in EVALUATED:
        raise SpecError(f"operation is {path.op!r}: known operations are {', '.join(EVALUATED)}")
    profile = profile or load_profile(name_profile(path, cpu))
    here = [one for one in known if one.cpu is None or not multiplies_bytes(cpu)]
    rows: dict[str, Tally] = {}
    for batch in batches:
        row = rows.setdefault(batch.family, Tally(path.name, path.op, profile.name, batch.family))
        judge(row, batch, path, profile, run, here)
        if tell is not None:
            tell(1)
    return list(rows.values())
