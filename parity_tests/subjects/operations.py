"""The differentiable ops, each with inputs and the bound on its float32 error: what every case about ops runs over.

`call(ops, leaves, consts)` is written once; `ops` is `qtx_ref.ops` (leaves are `Var`) or `qtx_torch.ops` (tensors).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qtx_ref.random import stream

SUMMED = (
    1.0,
    "a float32 sum of n products errs by about eps sqrt(n) / 10 of its typical size; n <= 64, repeated tokens more",
)
ROUNDED = 1.0, "two roundings to float32, at most eps / 2 each"
MOVED = 0.0, "values are moved or multiplied by a power of two: none is rounded"
NORMED = 1.0, "the deviations and their product with the gain are rounded, at most eps / 2 each"
EXPONENTIAL = 1.0, "exp of a score below 16 is off by the score's rounding, 16 eps / 2 of a share of 1/8 at most"


@dataclass(frozen=True)
class Operation:
    """`leaves` want gradients, `consts` do not. `bound` is (c, its reason) for value and gradient."""

    call: Callable[[Any, dict[str, Any], dict[str, Any]], Any]
    leaves: dict[str, np.ndarray]
    bound: tuple[float, str]
    consts: dict[str, np.ndarray] = field(default_factory=dict)


def away_from_zero(x: np.ndarray) -> np.ndarray:
    """Moves every element at least 0.05 away from the kink at 0."""
    return x + np.copysign(0.05, x)


def operations(n: int) -> dict[str, Operation]:
    """Every op on float64 inputs of width 4 n and 3 n tokens. n = 1 for central differences, 16 for float32 errors."""
    rng = stream(0, "operations", n)
    b, t, d, h, v = 2, 3 * n, 4 * n, 2, 5 * n

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape)

    keys = rng.uniform(size=(b, 1, t, d)) < 0.7
    keys[0, 0, 0] = False  # a row without keys
    scores = 3 * normal(b, h, t, d)
    shares = np.abs(normal(b, h, t, d)) / d
    pushed = np.where(np.abs(shares * 1.2 - 0.1) < 0.01, 0.02, shares)  # no stretched value within 0.008 of a clip
    rows = rng.uniform(size=(b, t)) < 0.7
    rows[1] = False  # a sequence without tokens
    targets = rng.integers(0, v, (b, t))
    some = np.where(np.arange(t) % 3 == 1, targets, -1)
    return {
        "linear": Operation(
            lambda o, x, c: o.linear(x["x"], x["weight"], x["bias"]),
            {"x": normal(b, t, d), "weight": normal(v, d), "bias": normal(v)},
            SUMMED,
        ),
        "linear_without_bias": Operation(
            lambda o, x, c: o.linear(x["x"], x["weight"]), {"x": normal(b, t, d), "weight": normal(v, d)}, SUMMED
        ),
        "linear_per_head": Operation(
            lambda o, x, c: o.linear(x["x"], x["weight"], x["bias"]),
            {"x": normal(b, t, h * d), "weight": normal(h, 3, d), "bias": normal(h, 3)},
            SUMMED,
        ),
        "matmul": Operation(
            lambda o, x, c: o.matmul(x["a"], x["b"]), {"a": normal(b, h, t, d), "b": normal(b, h, d, t)}, SUMMED
        ),
        "add": Operation(lambda o, x, c: o.add(x["a"], x["b"]), {"a": normal(b, t, d), "b": normal(t, d)}, SUMMED),
        "mul": Operation(lambda o, x, c: o.mul(x["a"], x["b"]), {"a": normal(b, t, d), "b": normal(b, 1, d)}, SUMMED),
        "scale": Operation(lambda o, x, c: o.scale(x["x"], 0.125), {"x": normal(b, t, d)}, MOVED),
        "divide": Operation(
            lambda o, x, c: o.divide(x["x"], c["d"]), {"x": normal(b, t, d)}, ROUNDED, {"d": 2.0 ** normal(d)}
        ),
        "hadamard": Operation(lambda o, x, c: o.hadamard(x["x"], 2 * n), {"x": normal(b, t, d)}, SUMMED),
        "mean": Operation(lambda o, x, c: o.mean(x["x"], 1), {"x": normal(b, t, d)}, ROUNDED),
        "mean_of_some": Operation(
            lambda o, x, c: o.mean(x["x"], 1, c["where"]), {"x": normal(b, t, d)}, ROUNDED, {"where": rows[:, :, None]}
        ),
        "layer_norm": Operation(
            lambda o, x, c: o.layer_norm(x["x"], x["weight"], x["bias"], 1e-5),
            {"x": 3 * normal(b, t, d) + 2, "weight": normal(d), "bias": normal(d)},
            NORMED,
        ),
        "softmax": Operation(lambda o, x, c: o.softmax(x["x"]), {"x": scores}, EXPONENTIAL),
        "softmax_masked": Operation(
            lambda o, x, c: o.softmax(x["x"], c["mask"]), {"x": scores}, EXPONENTIAL, {"mask": keys}
        ),
        "softmax_sink": Operation(
            lambda o, x, c: o.softmax(x["x"], c["mask"], x["sink"]),
            {"x": scores, "sink": normal(h, 1, 1)},
            EXPONENTIAL,
            {"mask": keys},
        ),
        "clip_stretch": Operation(lambda o, x, c: o.clip_stretch(x["p"], -0.1, 1.1), {"p": pushed}, ROUNDED),
        "clip_stretch_by_row": Operation(
            lambda o, x, c: o.clip_stretch(x["p"], c["gamma"], 1.0),
            {"p": pushed},
            ROUNDED,
            {"gamma": -0.1 + 0.002 * rng.uniform(size=(b, 1, t, 1))},
        ),
        "gelu": Operation(lambda o, x, c: o.gelu(x["x"]), {"x": 2 * normal(b, t, d)}, ROUNDED),
        "relu": Operation(lambda o, x, c: o.relu(x["x"]), {"x": away_from_zero(normal(b, t, d))}, MOVED),
        "sigmoid": Operation(lambda o, x, c: o.sigmoid(x["x"]), {"x": 3 * normal(b, t, d)}, ROUNDED),
        "tanh": Operation(lambda o, x, c: o.tanh(x["x"]), {"x": normal(b, t, d)}, ROUNDED),
        "cross_entropy": Operation(
            lambda o, x, c: o.cross_entropy(x["logits"], c["targets"]),
            {"logits": 3 * normal(b, t, v)},
            EXPONENTIAL,
            {"targets": targets},
        ),
        "cross_entropy_of_some": Operation(
            lambda o, x, c: o.cross_entropy(x["logits"], c["targets"]),
            {"logits": 3 * normal(b, t, v)},
            EXPONENTIAL,
            {"targets": some},
        ),
        "soft_cross_entropy": Operation(
            lambda o, x, c: o.soft_cross_entropy(x["logits"], c["weights"]),
            {"logits": 3 * np.random.default_rng(5).standard_normal((b, v))},
            EXPONENTIAL,
            {"weights": np.random.default_rng(6).dirichlet(np.full(v, 0.5), b)},
        ),
        "embedding": Operation(
            lambda o, x, c: o.embedding(x["table"], c["index"]),
            {"table": normal(v, d)},
            SUMMED,
            {"index": targets // 2},
        ),
        "split_heads": Operation(lambda o, x, c: o.split_heads(x["x"], h), {"x": normal(b, t, d)}, MOVED),
        "merge_heads": Operation(lambda o, x, c: o.merge_heads(x["x"]), {"x": normal(b, h, t, d)}, MOVED),
        "spread_heads": Operation(lambda o, x, c: o.spread_heads(x["x"], 3), {"x": normal(b, t, h)}, ROUNDED),
        "swap_last": Operation(lambda o, x, c: o.swap_last(x["x"]), {"x": normal(b, h, t, d)}, MOVED),
        "reshape": Operation(lambda o, x, c: o.reshape(x["x"], (b, t * d)), {"x": normal(b, t, d)}, MOVED),
        "concat": Operation(
            lambda o, x, c: o.concat([x["a"], x["b"]], 1), {"a": normal(b, 1, d), "b": normal(b, t, d)}, MOVED
        ),
        "token": Operation(lambda o, x, c: o.token(x["x"], 1), {"x": normal(b, t, d)}, MOVED),
        "select": Operation(
            lambda o, x, c: o.select(c["where"], x["a"], x["b"]),
            {"a": normal(b, h, t, d), "b": normal(b, h, t, d)},
            MOVED,
            {"where": rows[:, None, :, None]},
        ),
    }
