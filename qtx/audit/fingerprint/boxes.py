"""Black boxes: a path of an engine, or a Python function; and what is seen of one before its rules are searched."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from qtx_ref.spec import QuantSpec, SpecError

from ...engines.paths import Path, find_path, run
from .operands import Scales, make_operands
from .questions import Arrays, Box, Function, Question, Raised
from .search import Witness

ARGUMENTS = {  # of a function, in its order
    "quantize": ("x", "scale", "zero_point"),
    "dequantize": ("code", "scale", "zero_point"),
    "fake_quantize": ("x", "scale", "zero_point", "code_min", "code_max"),
    "linear": ("x_codes", "x_scale", "x_zero", "w_codes", "w_scale", "y_scale", "y_zero", "bias"),
}
RESULTS = {"quantize": "code", "dequantize": "y", "fake_quantize": "y", "linear": "y"}
FLOATS = ("dequantize", "fake_quantize")  # operations that answer with floats
CODES = {  # dtypes of codes that are tried
    "quantize": ("uint8", "int8", "uint16", "int16"),
    "dequantize": ("uint8", "int8", "uint16", "int16"),
    "fake_quantize": ("uint8", "int8"),
    "linear": ("uint8", "int8", "int16"),
}
PER_CHANNEL = ("per_channel", "-channel", "_channel")  # ends of the names of paths whose scales lie along an axis
FRACTIONS, COPIES = (0.25, 0.5, 0.75), 256  # of levels that are asked many times over


def load_function(target: str, op: str) -> Function:
    """The function `package.module:name` as a box of arrays by name. Raises SpecError where there is none."""
    module, _, name = target.partition(":")
    if not module or not name:
        raise SpecError(f"--callable {target}: write package.module:function")
    if (here := str(FilePath.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # a stranger's module fails as it likes
        raise SpecError(f"--callable {target}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise SpecError(f"--callable {target} is no function")
    return take_positions(found, op)


def take_positions(function: Callable[..., Any], op: str) -> Function:
    """A function of positions as one of names."""
    return lambda arrays: function(*(arrays[name] for name in ARGUMENTS[op]))


def choose_path(name: str, op: str | None) -> Path:
    """The path of that name and operation, or of the only one that can be asked for. Raises SpecError."""
    if op is not None:
        return find_path(name, op)
    found = []
    for one in ARGUMENTS:
        try:
            found.append(find_path(name, one))
        except SpecError as error:
            reason = error
    if not found:
        raise reason
    if len(found) > 1:
        raise SpecError(f"path {name} has several operations: choose --op {' or '.join(path.op for path in found)}")
    return found[0]


def open_path(path: Path, cpu: str | None) -> Function:
    """A path of an engine as a box. One in lanes is asked for whole ones alone, whose way its `profile` states; one of
    several channels for two that are alike: of one, engines make a tensor without."""
    channels = 2 if path.name.endswith(PER_CHANNEL) else 1

    def call(arrays: Arrays) -> np.ndarray:
        given: dict[str, Any]
        if path.op == "linear":
            given = {name.removesuffix("_codes"): value for name, value in arrays.items() if value is not None}
            given["w"], given["w_zero"] = np.ascontiguousarray(arrays["w_codes"].T), np.int8(0)
            if channels > 1:
                given["w_scale"] = np.full(len(arrays["w_codes"]), arrays["w_scale"])
            return run(path, path.op, given, cpu)["y"]
        given = dict(arrays)
        if path.op == "fake_quantize":
            given |= {end: int(arrays[end]) for end in ("code_min", "code_max")}
        else:
            given["dtype"] = str(arrays["zero_point"].dtype)
        name = "code" if path.op == "dequantize" else "x"
        x = arrays[name]
        given[name] = np.concatenate([x, np.repeat(x[-1:], -x.size % (channels * path.lanes))])
        if channels > 1:
            given |= {one: arrays[one].repeat(channels) for one in ("scale", "zero_point")}
            given |= {"axis": 0, name: given[name].reshape(channels, -1)}
        return run(path, path.op, given, cpu)[RESULTS[path.op]].reshape(-1)[: x.size]

    return call


@dataclass(frozen=True)
class Observed:
    """What a box was seen to do before the search."""

    specs: dict[str, QuantSpec]  # by dtype of codes
    lines: tuple[str, ...]  # what was seen of each
    stochastic: bool = False
    unexplained: Witness | None = None


def observe(box: Box, op: str, codes: Sequence[str]) -> Observed:
    """Asks for codes of each dtype far beyond both ends: the limits that come out are the quantizer's. Raises SpecError
    for a box that takes none."""
    if op in FLOATS:
        return Observed(
            {one: QuantSpec(bits_of_dtype(one), symmetric=False, signed=one[0] != "u") for one in codes}, ()
        )
    specs: dict[str, QuantSpec] = {}
    lines, stochastic, last = [], False, ""
    for one in codes:
        question = ask_ends(one) if op == "quantize" else ask_ends_linear(one)
        answer = box.ask(question)
        if isinstance(answer, Raised):
            last = answer.reason
            lines.append(f"codes {one}: refused ({last})")
            continue
        low, high = int(answer[0]), int(answer[1])
        spec = find_spec(low, high)
        lines.append(f"codes {one}: {low} to {high}")
        if spec is None and specs and bits_of_dtype(one) == 16:  # beyond the reach of float16, say
            lines[-1] += ", of which no quantizer is known; they are left out"
            continue
        if spec is None:
            shown = {"inputs": "far beyond both ends", "codes": one}
            return Observed({}, tuple(lines), False, Witness(shown, [low, high], {"every quantizer": "2^bits codes"}))
        if spec not in specs.values() or one[0] != "u" and spec.has_sign:
            specs = {name: other for name, other in specs.items() if other != spec} | {one: spec}
        if op == "quantize":
            copies = answer[2:].reshape(len(FRACTIONS), COPIES)
            chance, witness = judge_chance(copies)
            if witness is not None:
                return Observed({}, tuple(lines), True, witness)
            stochastic |= chance
    if not specs:
        raise SpecError(f"the box takes no codes of {', '.join(codes)}: {last}")
    return Observed(specs, tuple(lines), stochastic)


def judge_chance(copies: np.ndarray) -> tuple[bool, Witness | None]:
    """Whether one input has several codes, (fractions, copies); and the first fraction that is not rounded up as often
    as it says, within five standard deviations."""
    if not (copies != copies[:, :1]).any():
        return False, None
    for fraction, codes in zip(FRACTIONS, copies, strict=True):
        expected, spread = fraction * COPIES, (fraction * (1 - fraction) * COPIES) ** 0.5
        up = int((codes == 1).sum())
        if abs(up - expected) > 5 * spread or up + int((codes == 0).sum()) < COPIES:
            shown = {"x": fraction, "scale": 1.0, "zero_point": 0, "asked": COPIES}
            seen = {int(code): int(count) for code, count in zip(*np.unique(codes, return_counts=True), strict=True)}
            return True, Witness(
                shown, f"codes by count {seen}", {"stochastic": f"1 about {expected:.0f} times, else 0"}
            )
    return True, None


def ask_ends(codes: str) -> Question:
    """x far below and above every code, within float16 where codes are, and fractions many times over."""
    end = 1000 if bits_of_dtype(codes) == 8 else 40_000 if codes == "int16" else 70_000
    x = np.array([-end, end, *np.repeat(FRACTIONS, COPIES)], np.float32)
    arrays = {"x": x, "scale": np.asarray(1, np.float32), "zero_point": np.asarray(0, codes)}
    return Question("limits", arrays, x.size, frozenset({f"{codes} codes"}))


def ask_ends_linear(codes: str) -> Question:
    """Accumulators far below and above every code, within float16."""
    x, w = make_operands(np.array([-60_000, 60_000]), codes, 0)
    one = Scales(*(np.asarray(step, np.float32) for step in (2.0**-2, 2.0**-2, 1.25 * 2.0**-4)))
    zero = np.asarray(0, codes)
    arrays = {"x_codes": x, "x_scale": one.x, "x_zero": zero, "w_codes": w, "w_scale": one.w, "y_scale": one.y}
    return Question("limits", {**arrays, "y_zero": zero, "bias": None}, 2, frozenset({f"{codes} codes"}))  # type: ignore[dict-item]


def bits_of_dtype(codes: str) -> int:
    """Of a dtype of integers."""
    return 8 * np.dtype(codes).itemsize


def find_spec(low: int, high: int) -> QuantSpec | None:
    """The quantizer whose codes run from low to high; None where there is none."""
    for narrow in (False, True):
        for bits in range(2, 17):
            spec = QuantSpec(bits, symmetric=False, signed=low < 0, narrow=narrow)
            if (spec.code_min, spec.code_max) == (low, high):
                return spec
    return None
