"""The reference's values against SciPy and independent float64 formulas, and its float32 errors."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
from scipy import linalg, special

from parity_tests.proof.case import Case, Context
from parity_tests.proof.evaluate_ref import Function, Leaves, value_and_gradients
from parity_tests.proof.verdict import EPS, Verdict, against_truth, relative
from parity_tests.subjects import naive, small_models
from parity_tests.subjects.attentions import GATES, SITUATIONS, SOFTMAXES, attention_inputs, gate_inputs
from parity_tests.subjects.operations import Operation, operations
from qtx_ref import ops
from qtx_ref.backend import Model
from qtx_ref.tape import const

Arrays = dict[str, np.ndarray]
FLOAT64 = 1e-13, "two float64 formulas: rounding, times the length of their sums"


def masked_softmax(x: np.ndarray, mask: np.ndarray, sink: np.ndarray | None = None) -> np.ndarray:
    """Row by row through SciPy."""
    y = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:-1]):
        keep = np.broadcast_to(mask, x.shape)[at]
        extra = [] if sink is None else [np.broadcast_to(sink, (*x.shape[:-1], 1))[at][0]]
        if keep.any():
            y[at][keep] = special.softmax(np.concatenate([x[at][keep], extra]))[: keep.sum()]
    return y


def mean_nll(logits: np.ndarray, targets: np.ndarray) -> float:
    return naive.loss(logits, {"targets": targets})


def clip(p: np.ndarray, gamma: np.ndarray | float, zeta: float) -> np.ndarray:
    return np.minimum(np.maximum(zeta * p + gamma * (1 - p), 0), 1)


def per_head(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.concatenate([part @ w[h].T + b[h] for h, part in enumerate(np.split(x, len(w), axis=-1))], axis=-1)


FORMULAS = {
    "linear": lambda x, c: np.einsum("bti,oi->bto", x["x"], x["weight"]) + x["bias"],
    "linear_without_bias": lambda x, c: np.einsum("bti,oi->bto", x["x"], x["weight"]),
    "linear_per_head": lambda x, c: per_head(x["x"], x["weight"], x["bias"]),
    "matmul": lambda x, c: np.einsum("bhij,bhjk->bhik", x["a"], x["b"]),
    "add": lambda x, c: x["a"] + x["b"][None],
    "mul": lambda x, c: x["a"] * np.tile(x["b"], (1, x["a"].shape[1], 1)),
    "scale": lambda x, c: x["x"] / 8,
    "divide": lambda x, c: x["x"] * c["d"] ** -1,
    "hadamard": lambda x, c: (
        x["x"] @ linalg.block_diag(*2 * [linalg.hadamard(x["x"].shape[-1] // 2)]) / np.sqrt(x["x"].shape[-1] // 2)
    ),
    "mean": lambda x, c: np.mean(x["x"], axis=1, keepdims=True),
    "mean_of_some": lambda x, c: np.stack(
        [(v[k[:, 0]].mean(0) if k.any() else 0 * v[0])[None] for v, k in zip(x["x"], c["where"], strict=True)]
    ),
    "layer_norm": lambda x, c: naive.norm({"n.weight": x["weight"], "n.bias": x["bias"]}, "n", x["x"], 1e-5),
    "softmax": lambda x, c: special.softmax(x["x"], axis=-1),
    "softmax_masked": lambda x, c: masked_softmax(x["x"], c["mask"]),
    "softmax_sink": lambda x, c: masked_softmax(x["x"], c["mask"], x["sink"]),
    "clip_stretch": lambda x, c: clip(x["p"], -0.1, 1.1),
    "clip_stretch_by_row": lambda x, c: clip(x["p"], c["gamma"], 1.0),
    "gelu": lambda x, c: naive.gelu(x["x"]),
    "relu": lambda x, c: (x["x"] + np.abs(x["x"])) / 2,
    "sigmoid": lambda x, c: 0.5 + 0.5 * np.tanh(x["x"] / 2),
    "tanh": lambda x, c: 1 - 2 / (np.exp(2 * x["x"]) + 1),
    "cross_entropy": lambda x, c: np.asarray(mean_nll(x["logits"], c["targets"])),
    "cross_entropy_of_some": lambda x, c: np.asarray(mean_nll(x["logits"], c["targets"])),
    "soft_cross_entropy": lambda x, c: (c["weights"] * -np.log(special.softmax(x["logits"], axis=-1))).sum(-1).mean(),
    "embedding": lambda x, c: np.eye(len(x["table"]))[c["index"]] @ x["table"],
    "split_heads": lambda x, c: np.stack(np.split(x["x"], 2, axis=-1), axis=1),
    "merge_heads": lambda x, c: np.concatenate(list(x["x"].swapaxes(0, 1)), axis=-1),
    "spread_heads": lambda x, c: x["x"] @ np.kron(np.eye(2), np.ones((1, 3))),
    "swap_last": lambda x, c: np.einsum("bhij->bhji", x["x"]),
    "reshape": lambda x, c: np.stack([one.ravel() for one in x["x"]]),
    "concat": lambda x, c: np.stack([np.vstack(pair) for pair in zip(x["a"], x["b"], strict=True)]),
    "token": lambda x, c: np.stack([one[1] for one in x["x"]]),
}


def check_forward(name: str, context: Context) -> list[Verdict]:
    op = operations(1)[name]
    got = op.call(ops, {key: const(value) for key, value in op.leaves.items()}, op.consts).value
    return [relative("value", got, FORMULAS[name](op.leaves, op.consts), *FLOAT64)]


def float32_errors(function: Function, leaves: Leaves, bound: tuple[float, str]) -> list[Verdict]:
    """Value and gradients in float32 against the same in float64, from the same (float32) inputs."""
    inputs = {name: value.astype(np.float32) for name, value in leaves.items()}
    value, grads = value_and_gradients(function, inputs, "float32")
    truth, true_grads = value_and_gradients(function, inputs)
    verdicts = [against_truth("value", value, truth, EPS["float32"], *bound)]
    for name in leaves:
        verdicts.append(against_truth(f"gradient of {name}", grads[name], true_grads[name], EPS["float32"], *bound))
    return verdicts


def check_float32(name: str, context: Context) -> list[Verdict]:
    op: Operation = operations(16)[name]
    return float32_errors(lambda x: op.call(ops, x, op.consts), op.leaves, op.bound)


def check_patches(context: Context) -> list[Verdict]:
    image = np.arange(96, dtype=np.float32).reshape(2, 3, 4, 4)
    want = np.stack([[one[:, r : r + 2, c : c + 2].ravel() for r in (0, 2) for c in (0, 2)] for one in image])
    return [relative("value", ops.patches(image, 2), want, 0.0, "values are moved, none is changed")]


def check_attention(softmax: str, situation: str, context: Context) -> list[Verdict]:
    inputs = attention_inputs(softmax, situation, 1)
    x, shape = inputs.leaves, inputs.leaves["q"].shape
    mask = np.broadcast_to(inputs.mask, (*shape[:3], shape[2]))
    sinks = x.get("sink", [None] * shape[1])
    heads = [
        [
            naive.head_context(x["q"][b, h], x["k"][b, h], x["v"][b, h], mask[b, h], inputs.spec, sinks[h])
            for h in range(shape[1])
        ]
        for b in range(shape[0])
    ]
    want = np.stack([np.concatenate(row, axis=-1) for row in heads])
    got = inputs.reference({name: const(value) for name, value in x.items()}).value
    return [relative("value", got, want, *FLOAT64)]


def check_gate(kind: str, context: Context) -> list[Verdict]:
    inputs = gate_inputs(kind, 1)
    x = inputs.leaves
    rows = zip(x["x"], x["context"], inputs.rows, strict=True)
    want = np.stack([c * naive.gate_openings(inputs.spec, x, "layer.0.attn", one, real) for one, c, real in rows])
    got = inputs.reference({name: const(value) for name, value in x.items()}).value
    return [relative("value", got, want, *FLOAT64)]


def check_model(name: str, context: Context) -> list[Verdict]:
    small = small_models.build(name)
    model = Model(small.spec, small.params, dtype="float64")
    want = naive.forward(small.spec, small.params, small.batch)
    reason = "two float64 formulas through two layers"
    verdicts = [relative("output", model.forward(small.batch), want, 1e-12, reason)]
    if small.spec.head != "none":
        nll, count, _ = model.evaluate(small.batch)
        verdicts.append(relative("loss", nll / count, naive.loss(want, small.batch), 1e-12, reason))
    return verdicts


def list_cases() -> list[Case]:
    rows = [Case("ops", f"{name}_value", "ref", partial(check_forward, name)) for name in FORMULAS]
    rows += [Case("ops", f"{name}_float32", "ref", partial(check_float32, name)) for name in FORMULAS]
    rows.append(Case("ops", "patches", "ref", check_patches))
    for softmax, at in product(SOFTMAXES, SITUATIONS):
        rows.append(Case("attention", f"{softmax}_{at}_value", "ref", partial(check_attention, softmax, at)))
    rows += [Case("attention", f"gate_{kind}_value", "ref", partial(check_gate, kind)) for kind in GATES]
    rows += [Case("models", f"{name}_value", "ref", partial(check_model, name)) for name in small_models.specs()]
    return rows
