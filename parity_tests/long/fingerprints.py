"""Planted boxes come back from `qtx audit fingerprint`: `python -m parity_tests.long.fingerprints --combinations 1000`.

A box computes with `qtx_ref` under rules drawn at random. Its fingerprint must be those rules, or ones that no question
of the pool and none of 100,000 fresh inputs tells from them. `--engines` asks each path of the installed engines
instead, and holds what comes out to the profile that states the path.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtx.audit.fingerprint.boxes import ARGUMENTS, CODES, open_path
from qtx.audit.fingerprint.finding import find_rules
from qtx.audit.fingerprint.linear import Linear, make_requantize, operand_spec
from qtx.audit.fingerprint.quantizers import Dequantize, FakeQuantize, quantize_values
from qtx.audit.fingerprint.questions import Arrays, Function, Values
from qtx.audit.fingerprint.report import make_profile
from qtx.audit.fingerprint.search import Fingerprint
from qtx.engines.paths import Path, list_paths, name_profile
from qtx.progress import Progress
from qtx_ref.integer import fixed_point, float_product, products
from qtx_ref.profiles import profile
from qtx_ref.quant import affine
from qtx_ref.spec import (
    Bias,
    DequantizeRule,
    FakeQuantizeRule,
    FloatProduct,
    MatmulRule,
    Profile,
    QuantizeRule,
    QuantSpec,
    SpecError,
)

SHARES = {"quantize": 0.5, "linear": 0.4, "fake_quantize": 0.08, "dequantize": 0.02}  # of the combinations


# --- boxes under rules ------------------------------------------------------------------------------------------------


def plant(op: str, values: Values, seed: int = 0) -> Function:
    """A box that computes under rules."""
    if op == "linear":
        return lambda arrays: multiply(arrays, values)
    if op == "dequantize":
        rule = DequantizeRule(*values)
        return lambda a: affine.dequantize(a["code"], a["scale"], a["zero_point"].astype(np.int32), rule)
    if op == "fake_quantize":
        fake = FakeQuantizeRule(QuantizeRule(*values[:7]), DequantizeRule(*values[7:]))
        return lambda a: affine.fake_quantize(a["x"], a["scale"], whole(a), spec_of(a), fake)[0]
    rng, quantizing = np.random.default_rng(seed), QuantizeRule(*values)

    def quantize(a: Arrays) -> np.ndarray:
        words = rng.integers(0, 2**32, a["x"].shape, np.uint32)
        return affine.quantize(a["x"], a["scale"], whole(a), spec_of(a), quantizing, words)

    return quantize


def whole(arrays: Arrays) -> np.ndarray:
    """The zero point as the reference takes it."""
    return arrays["zero_point"].astype(np.int32)


def spec_of(arrays: Arrays) -> QuantSpec:
    """All codes of the zero point's dtype."""
    return operand_spec_of(str(arrays["zero_point"].dtype))


def operand_spec_of(codes: str) -> QuantSpec:
    """All codes of a dtype."""
    return QuantSpec(8 * np.dtype(codes).itemsize, symmetric=False, signed=codes[0] != "u")


def multiply(arrays: Arrays, values: Values) -> np.ndarray:
    """A linear layer. Raises TypeError for a bias of the other kind."""
    rule, place, bias = make_requantize(values[4:]), values[3], arrays["bias"]
    if bias is not None and (bias.dtype == np.int32) != (place is Bias.INT32):
        raise TypeError(f"a bias of {bias.dtype}")
    x, w, y = arrays["x_scale"], arrays["w_scale"], arrays["y_scale"]
    codes = str(arrays["x_codes"].dtype)
    wide = codes == "int16"
    integers = None if bias is None or place is not Bias.INT32 else bias.astype(np.int64 if wide else np.int32)
    specs = operand_spec(codes), QuantSpec(8, symmetric=True)
    zero, matmul = arrays["x_zero"].astype(np.int32), MatmulRule(*values[:3])
    operands = arrays["x_codes"], arrays["w_codes"]
    total = products.linear(*operands, *specs, zero, None, integers, 64 if wide else 32, matmul)
    scaled = None
    if bias is not None and isinstance(rule, FloatProduct) and place is not Bias.INT32:
        scaled = float_product.scale_bias(bias, x.astype(np.float64) * w, y, rule, place)
    real = fixed_point.real_multiplier(x, w, y, rule)
    y_zero = arrays["y_zero"].astype(np.int32)
    with np.errstate(all="ignore"):
        return fixed_point.requantize(total, real, y_zero, operand_spec_of(codes), rule, scaled, place)


def list_candidates(op: str) -> list[Values]:
    """Every combination that a box may be planted with."""
    if op == "quantize":
        return [*quantize_values(False), *quantize_values(True)]
    specs = {codes: operand_spec_of(codes) for codes in CODES[op]}
    made = {"linear": Linear, "fake_quantize": FakeQuantize, "dequantize": Dequantize}[op](specs)  # type: ignore[arg-type]
    return list(made.candidates)


# --- the proof --------------------------------------------------------------------------------------------------------


@dataclass
class Planted:
    """One planted box and what came back."""

    op: str
    values: Values
    found: Fingerprint

    @property
    def returned(self) -> bool:
        """Whether it came back, or one equal to it."""
        return self.values in self.found.alike

    @property
    def exact(self) -> bool:
        """Whether it is the one that was named."""
        return self.returned and self.found.values == self.values

    def tell(self) -> str:
        """What was planted and what is said of it."""
        rules = ", ".join(str(value) for value in self.values if value is not None)
        said = self.found.unexplained or ", ".join(str(v) for v in self.found.values if v is not None)
        return f"{self.op}: planted {rules}: {said}"


def draw_combinations(count: int, seed: int) -> list[tuple[str, Values]]:
    """Operations and rules, at random."""
    rng = np.random.default_rng(seed)
    candidates = {op: list_candidates(op) for op in SHARES}
    drawn = []
    for op, share in SHARES.items():
        many = max(1, round(count * share))
        drawn += [(op, candidates[op][int(i)]) for i in rng.integers(0, len(candidates[op]), many)]
    return drawn[:count]


def plant_all(drawn: list[tuple[str, Values]], tell: Callable[[str], None] = lambda line: None) -> list[Planted]:
    """The fingerprint of each; those that do not come back are told of at once."""
    results = []
    with Progress("fingerprints", len(drawn)) as bar:
        for i, (op, values) in enumerate(drawn):
            results.append(Planted(op, values, find_rules(plant(op, values, i), op, seed=i)[0]))
            bar.advance(note=op)
            if not results[-1].returned:
                tell(f"{i}: {results[-1].tell()}")
            elif i % 20 == 19:
                tell(f"{i + 1} of {len(drawn)} boxes, {sum(not one.returned for one in results)} did not come back")
    return results


def summarize(results: list[Planted]) -> str:
    """Counts by operation."""
    lines = []
    for op in SHARES:
        some = [one for one in results if one.op == op]
        if some:
            calls = sorted(one.found.deciding for one in some)
            back = sum(one.returned for one in some)
            lines.append(
                f"{op}: {back} of {len(some)} came back, {back - sum(one.exact for one in some)} of them as an equal "
                f"one; calls to decide: median {calls[len(calls) // 2]}, most {calls[-1]}"
            )
    return "\n".join(lines)


# --- engines ----------------------------------------------------------------------------------------------------------


def list_rules(rules: Profile, op: str) -> tuple[Any, ...]:
    """What a profile says of an operation."""
    if op == "linear":
        return rules.matmul, rules.bias, rules.requantize
    return (getattr(rules, op),)


def ask_engine(path: Path) -> tuple[str, bool]:
    """A line on the path, and whether its rules are explained and its profile's among them."""
    codes = tuple(one for one in CODES[path.op] if one in path.codes)
    lines = [ask_codes(path, codes)]
    if not lines[0][1] and len(codes) > 1:  # kernels of one path may differ by the dtype of codes
        lines += [ask_codes(path, (one,)) for one in codes]
    return "\n  ".join(line for line, _ in lines), any(good for _, good in lines)


def ask_codes(path: Path, codes: tuple[str, ...]) -> tuple[str, bool]:
    """The same of some of its dtypes of codes."""
    try:
        found, _ = find_rules(open_path(path, None), path.op, codes)
    except SpecError as error:
        return f"{path.name} {path.op} ({', '.join(codes)}): {error}", False
    head = f"{path.name} {path.op} ({', '.join(codes)}): {found.deciding} calls, {found.calls} in all"
    if found.unexplained is not None:
        return f"{head}: no combination explains {found.unexplained}", False
    alike = [list_rules(make_profile(found, path.engine, path.name, values), path.op) for values in found.alike]
    try:
        stated = list_rules(profile(name_profile(path)), path.op)
    except ValueError as error:
        return f"{head}: {', '.join(map(str, found.values))}; {error}", False
    verdict = "is" if alike[0] == stated else "equals" if stated in alike else "is not"
    return f"{head}: {verdict} profile {name_profile(path)}: {', '.join(map(str, found.values))}", stated in alike


def main() -> int:
    parser = argparse.ArgumentParser(description="planted boxes come back from their fingerprints")
    parser.add_argument("--combinations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", action="store_true", help="ask the installed engines instead")
    parser.add_argument("--only", default="", help="the operations, or of engines the paths, whose name has this")
    options = parser.parse_args()
    if options.engines:
        results = []
        for path in list_paths():
            if path.op in ARGUMENTS and options.only in path.name:
                line, good = ask_engine(path)
                print(line, flush=True)
                results.append(good)
        print(f"{sum(results)} of {len(results)} paths are as their profiles say")
        return int(not all(results))
    start = time.perf_counter()
    drawn = [one for one in draw_combinations(options.combinations, options.seed) if options.only in one[0]]
    planted = plant_all(drawn, lambda line: print(line, flush=True))
    lost = [one for one in planted if not one.returned]
    print(summarize(planted))
    undetermined = Counter(
        f"{one.op} {verdict.axis}" for one in planted for verdict in one.found.verdicts if verdict.equal
    )
    print("undetermined axes: " + ", ".join(f"{axis} {count}" for axis, count in undetermined.most_common()))
    print(f"{len(planted)} boxes, {len(lost)} did not come back, {time.perf_counter() - start:.0f} s")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
