"""The reference's integers against outside truth: Python's unbounded integers, `math` in float64, worked literals."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from parity_tests.proof.case import Case, Context
from parity_tests.proof.verdict import Verdict, equal, exact, holds, within
from parity_tests.subjects import integer_models, rules
from parity_tests.subjects.integer_models import record_run, same
from qtx_ref.backend import IntegerModel
from qtx_ref.integer import lowering, ops
from qtx_ref.random import stream

HALF = Fraction(1, 2)
ONE = 1 << ops.PROBABILITY_BITS
STEP = 0.05  # of the score codes below


def half_up(x: Fraction) -> int:
    return math.floor(x + HALF)


def half_away(x: Fraction) -> int:
    return half_up(x) if x >= 0 else -half_up(-x)


def check_literals(context: Context) -> list[Verdict]:
    """Worked by hand."""
    table = np.int32([4, 2, 1])  # stands for 1, 1/2, 1/4 and what follows
    code, mask = np.int8([[[[7, 6, 0, 7]]]]), np.array([[[[True, True, True, False]]]])
    p = [ONE * 4 / 7, ONE * 2 / 7, ONE / 7, 0]
    eps = np.int64(0)
    pairs = {
        "half_up": (ops.half_up(np.array([-5, -3, -1, 1, 3, 5]), np.array(2)).tolist(), [-2, -1, 0, 1, 2, 3]),
        "softmax": (ops.softmax(code, mask, table)[0, 0, 0].tolist(), [math.floor(x + 0.5) for x in p]),
        "softmax of no key": (ops.softmax(code, mask & False, table).tolist(), [[[[0, 0, 0, 0]]]]),
        "normalize -1 and 1": (ops.normalize(np.int8([[3, 5]]), eps).tolist(), [[-(2**16), 2**16]]),
        "normalize a constant": (ops.normalize(np.int8([[9, 9, 9]]), eps).tolist(), [[0, 0, 0]]),
        "normalize 0, 0, 3": (ops.normalize(np.int8([[0, 0, 3]]), eps).tolist(), [[-46341, -46341, 92682]]),
        "clip_stretch": (
            ops.clip_stretch(
                np.array([0, ONE // 2, ONE]), np.int64(1 << 24), np.array(-ONE // 2)
            ).tolist(),  # p - (1 - p) / 2
            [0, ONE // 4, ONE],
        ),
        "row_gamma": (ops.row_gamma(np.int64(30), np.array([[True] * 4, [False] * 4])).tolist(), [[-8], [-30]]),
        "weighted_sum": (
            ops.weighted_sum([np.int32([1, -1, 3])], [np.int64(1)], np.int64(1), rules.ADD_UP).tolist(),
            [1, 0, 2],
        ),
        "weighted_sum, half away": (
            ops.weighted_sum([np.int32([1, -1, 3])], [np.int64(1)], np.int64(1), rules.ADD_AWAY).tolist(),
            [1, -1, 2],
        ),
        "mean": (ops.mean(np.int32([[[1], [2]]]), None).tolist(), [[[2]]]),
        "exp(0)": (ops.exp_polynomial(np.array(0)).item(), 16781911),  # 0.3585 1.353^2 + 0.344 = 1.00028
        "gelu(0)": (ops.gelu_polynomial(np.array(0)).item(), 0),
        "sigmoid(0)": (ops.sigmoid_polynomial(np.array(0)).item(), 134198951),
    }
    multipliers, shift = lowering.common_shift([np.array(0.75), np.array(2.0**-30)])
    pairs["common_shift"] = ([int(m) for m in multipliers] + [int(shift)], [3 << 28, 1, 30])
    return [equal(name, got, want) for name, (got, want) in pairs.items()]


def check_softmax(context: Context) -> list[Verdict]:
    """Exactly, by its definition; and near the softmax of the scores."""
    rng = stream(0, "integer softmax")
    table = np.rint(np.exp(-STEP * np.arange(256)) * 2.0**ops.EXP_BITS).astype(np.int32)
    code = rng.integers(-128, 128, (2, 2, 3, 9)).astype(np.int8)
    code[0, 0, 0], code[0, 0, 1] = 127, [-128] * 8 + [127]
    mask = rng.uniform(size=(2, 1, 3, 9)) < 0.7
    mask[1, 0, 2] = False
    sinks = (np.int32([-300, 200]), np.int64([1 << 20, 1100000]))
    verdicts = []
    for name, sink in (("plain", None), ("sink", sinks)):
        got = ops.softmax(code, mask, table, sink)
        want, real = np.zeros(code.shape, np.int64), np.zeros(code.shape)
        for b, h, q in np.ndindex(code.shape[:3]):
            keys = [j for j in range(9) if mask[b, 0, q, j]]
            top = max([int(code[b, h, q, j]) for j in keys] + ([int(sink[0][h])] if sink else []), default=0)
            e = {j: int(table[min(top - int(code[b, h, q, j]), 255)]) for j in keys}
            total, mass = sum(e.values()), sum(math.exp(STEP * (int(code[b, h, q, j]) - top)) for j in keys)
            if sink:
                share = Fraction(int(table[min(top - int(sink[0][h]), 255)]) * int(sink[1][h]), 1 << 20)
                total += half_up(share)
                mass += math.exp(STEP * (int(sink[0][h]) - top)) * int(sink[1][h]) / 2**20
            for j in keys:
                want[b, h, q, j] = half_up(Fraction(e[j] * ONE, total))
                real[b, h, q, j] = math.exp(STEP * (int(code[b, h, q, j]) - top)) / mass
        verdicts.append(exact(name, got, want))
        reason = "exponentials are multiples of 2^-24, far ones of the table's last"
        verdicts.append(within(f"{name}: softmax", got / ONE, real, 2e-5, reason))
    return verdicts


def check_clip(context: Context) -> list[Verdict]:
    rng = stream(0, "integer clip")
    p = np.concatenate([rng.integers(0, ONE + 1, 200), [0, 1, ONE - 1, ONE]])
    verdicts = []
    for zeta, gamma in ((1.0, 0.0), (1.003, -0.003), (1.5, -64.0), (8.0, -12.0 / 128)):
        z, g = round(zeta * 2**24), round(gamma * ONE)
        got = ops.clip_stretch(p, np.int64(z), np.int64(g))
        want = [
            min(max(half_up(Fraction(z * int(x), 1 << 24)) + half_up(Fraction(g * (ONE - int(x)), ONE)), 0), ONE)
            for x in p
        ]
        verdicts.append(exact(f"zeta {zeta}, gamma {gamma}", got, np.array(want)))
        real = np.clip((zeta - gamma) * (p / ONE) + gamma, 0, 1)
        verdicts.append(within(f"zeta {zeta}, gamma {gamma}: real", got / ONE, real, 1e-7, "zeta in 24 bits"))
    mask = rng.uniform(size=(5, 7)) < 0.5
    keys = [max(int(row.sum()), 1) for row in mask]
    want = [[-half_up(Fraction(12345, n))] for n in keys]
    return [*verdicts, exact("gamma of a row", ops.row_gamma(np.int64(12345), mask), np.array(want))]


def check_root(context: Context) -> list[Verdict]:
    """math.isqrt at both ends, around squares, and anywhere."""
    rng = stream(0, "integer root")
    roots = [2**30, 2**31 - 1, 2**30 + 12345, *rng.integers(2**30, 2**31, 300).tolist()]
    x = [r * r + d for r in roots for d in (-1, 0, 1)] + [2**60, 2**62 - 1, *rng.integers(2**60, 2**62, 700).tolist()]
    x = [v for v in x if 2**60 <= v < 2**62]
    return [exact("square_root", ops.square_root(np.array(x)), np.array([math.isqrt(v) for v in x]))]


def check_normalize(context: Context) -> list[Verdict]:
    rng = stream(0, "integer norm")
    verdicts = []
    for bits, width, eps in ((8, 5, 0), (8, 768, 1000), (16, 768, 3), (16, 4096, 0), (16, 8, 10**12)):
        code = rng.integers(0, 2**bits, (4, width))
        code[1] = np.where(np.arange(width) % 2, 2**bits - 1, 0)  # the largest squares
        code[2] = np.arange(width) == 0  # nearly nothing
        got = ops.normalize(code, np.int64(eps))
        want = np.zeros(code.shape, np.int64)
        for i, row in enumerate(code.tolist()):
            w = max(width * sum(c * c for c in row) - sum(row) ** 2 + eps, 1)
            half = (62 - w.bit_length()) // 2  # w 4^half in [2^60, 2^62)
            root = math.isqrt(w << 2 * half)
            want[i] = [half_up(Fraction((width * c - sum(row)) << half + 16, root)) for c in row]
        verdicts.append(exact(f"{width} codes of {bits} bits, eps {eps}", got, want))
        centred = code - code.mean(-1, keepdims=True)
        real = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps / width**2 + 1e-300)
        verdicts.append(within(f"{width} codes: LayerNorm", got / 2**16, real, 1e-5, "half of 2^-16, and float64"))
    return verdicts


def check_sums(context: Context) -> list[Verdict]:
    rng = stream(0, "integer sums")
    ends = [-(2**31), 2**31 - 1, -1, 0, 1]
    a, b = (np.concatenate([ends, rng.integers(-(2**31), 2**31, 200)]).astype(np.int32) for _ in range(2))
    verdicts = []
    for rule, rounded in ((rules.ADD_UP, half_up), (rules.ADD_AWAY, half_away)):
        for m, n, shift in ((2**30, 2**30, 30), (2**29 + 1, 7, 61), (3, 2**29, 31)):
            got = ops.weighted_sum([a, b], [np.int64(m), np.int64(n)], np.int64(shift), rule)
            pairs = zip(a.tolist(), b.tolist(), strict=True)
            want = [rounded(Fraction(x * m + y * n, 1 << shift)) for x, y in pairs]
            verdicts.append(exact(f"weighted_sum {rule.rounding} {m} {n} {shift}", got, np.array(want)))
    x, where = rng.integers(-(2**31), 2**31, (4, 6, 3)).astype(np.int32), rng.uniform(size=(4, 6, 1)) < 0.5
    where[0], where[1] = False, True
    want = np.zeros((4, 1, 3), np.int64)
    for i, c in np.ndindex(4, 3):
        rows = [int(x[i, t, c]) for t in range(6) if where[i, t, 0]]
        want[i, 0, c] = half_up(Fraction(sum(rows), max(len(rows), 1)))
    verdicts.append(exact("mean", ops.mean(x, where), want))
    reals = [10.0 ** rng.uniform(-6, 6, 50), 10.0 ** rng.uniform(-6, 6, 50)]
    multipliers, shift = lowering.common_shift([np.array(r) for r in reals])
    for m, real in zip(multipliers, reals, strict=True):
        error = np.abs(m * 2.0**-shift - real) / np.maximum(*reals)
        verdicts.append(holds("common_shift", float(error.max()), 2.0**-30, "half of 2^-29 of the larger"))
    return verdicts


def check_polynomial(context: Context) -> list[Verdict]:
    """Exactly, in Python's integers; and within what the papers' polynomials err."""
    rng = stream(0, "integer polynomials")
    x = np.concatenate([rng.integers(-(2**20), 2**20, 500), [0, 1, -1, 2**31 - 1, -(2**31), 2**26, 45426, 45425]])

    def exp(v: int) -> int:
        z, r = divmod(v, 45426)
        value = half_up(Fraction((88670 - r) ** 2 * 23495, 2**16)) + 1477468750
        return half_up(Fraction(value, 2 ** (min(z, 50) + 8)))

    def gelu(v: int) -> int:
        v = min(max(v, -(2**26)), 2**26)
        t = min(half_up(Fraction(abs(v) * 46341, 2**16)), 115933)
        erf = 2**32 - half_up(Fraction((t - 115933) ** 2 * 18927, 2**16))
        erf = half_up(Fraction(-erf if v < 0 else erf, 2**16))
        return half_up(Fraction(v * (2**16 + erf), 2**13))

    def sigmoid(v: int) -> int:
        e = exp(abs(v))
        return half_up(Fraction((e if v < 0 else 2**24) * ONE, e + 2**24))

    def tanh(v: int) -> int:
        return 2 * sigmoid(2 * v) - ONE

    functions = {  # integers, float64, bits, the largest error
        "exp": (exp, lambda v: math.exp(-v), ops.exp_polynomial, 24, 2.15e-3),
        "gelu": (gelu, lambda v: v / 2 * (1 + math.erf(v / 2**0.5)), ops.gelu_polynomial, 20, 2.0e-2),
        "sigmoid": (sigmoid, lambda v: 0.5 + 0.5 * math.tanh(v / 2), ops.sigmoid_polynomial, 28, 1.0e-3),
        "tanh": (tanh, math.tanh, ops.tanh_polynomial, 28, 2.0e-3),
    }
    verdicts = []
    for name, (whole, real, ours, bits, error) in functions.items():
        given = np.abs(x) if name == "exp" else x
        got = ours(given)
        verdicts.append(exact(name, got, np.array([whole(int(v)) for v in given])))
        near = np.abs(given) <= 2**20
        want = np.array([real(v / 2**16) for v in given[near].tolist()])
        verdicts.append(
            within(f"{name}: real", got[near] / 2.0**bits, want, error, "the polynomial itself errs so much")
        )
    return verdicts


def check_tables(context: Context) -> list[Verdict]:
    """Every entry the code nearest to the function in float64."""
    functions = {
        "gelu": lambda v: v / 2 * math.erfc(-v / 2**0.5),
        "sigmoid": lambda v: 1 / (1 + math.exp(-v)) if v > 0 else math.exp(v) / (1 + math.exp(v)),
        "tanh": math.tanh,
    }
    tables = {
        ("bert_gate_mlp", "layer.0.ffn.hidden", "layer.0.ffn.activation"): "gelu",
        ("bert_gate_mlp", "layer.1.attn.gate_logit", "layer.1.attn.gate"): "sigmoid",
        ("bert_classify", "head.pool", "head.activation"): "tanh",
    }
    verdicts = []
    for (name, before, after), kind in tables.items():
        low = integer_models.small(name)
        c, spec = low.constants, low.quants[after]
        scale, zero = float(c[f"{before}.scale"]), int(c[f"{before}.zero_point"])
        real = np.array([functions[kind](scale * (code - zero)) for code in range(256)])
        level = real / float(c[f"{after}.scale"]) + int(c[f"{after}.zero_point"])
        want = np.clip(level, spec.code_min, spec.code_max)
        verdicts.append(within(f"{name} {after}", c[f"{after}.table"], want, 0.5 + 1e-9, "the nearest code"))
    low = integer_models.small("bert_plain")
    table, step = low.constants["layer.0.attn.probs.table"], low.constants["layer.0.attn.scores.scale"]
    want = np.array([math.exp(-float(step) * d) * 2**24 for d in range(table.size)])
    verdicts.append(within("exponentials", table, want, 0.5 + 1e-6, "the nearest"))
    last = math.exp(-float(step) * table.size) * 2**24
    return [*verdicts, holds("exponentials beyond", last if table.size < 256 else 0.0, 0.5, "round to the last, 0")]


def check_strict(context: Context) -> list[Verdict]:
    """Matmuls in NumPy's integers and not a float anywhere: the same codes as through float BLAS."""
    verdicts = []
    for name in ("bert_sink_and_mlp", "opt_gate_linear", "vit_clipped_row"):
        low = integer_models.small(name)
        runs = [record_run(low.model(IntegerModel, strict=strict), low.batch) for strict in (True, False)]
        verdicts += same(*runs)
    return verdicts


RUNS = (
    check_literals,
    check_softmax,
    check_clip,
    check_root,
    check_normalize,
    check_sums,
    check_polynomial,
    check_tables,
    check_strict,
)


def list_cases() -> list[Case]:
    return [Case("integer", run.__name__.removeprefix("check_"), "ref", run) for run in RUNS]
