"""torch's ops, and the reference's in float32, against float64: at most twice the error of the obvious torch
composition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg
from torch import Tensor

from parity_tests.proof import evaluate_ref
from parity_tests.proof.case import Case, Context
from parity_tests.proof.evaluate_ref import Leaves
from parity_tests.proof.evaluate_torch import array, round_leaves, tensor, value_and_gradients
from parity_tests.proof.verdict import EPS, Verdict, against_truth, exact
from parity_tests.subjects.operations import operations
from qtx_ref import ops as ref_ops
from qtx_ref.random import stream
from qtx_ref.tape import const
from qtx_torch import ops

Tensors = dict[str, Tensor]


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask, torch.finfo(x.dtype).min).softmax(-1) * mask


def sink_softmax(x: Tensor, mask: Tensor, sink: Tensor) -> Tensor:
    joined = torch.cat([x.masked_fill(~mask, torch.finfo(x.dtype).min), sink.expand(*x.shape[:-1], 1)], -1)
    return joined.softmax(-1)[..., :-1] * mask


def mean_of_some(x: Tensor, where: Tensor) -> Tensor:
    return (x * where).sum(1, keepdim=True) / where.sum(1, keepdim=True).clamp(min=1)


def mean_nll(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def sylvester(like: Tensor) -> Tensor:
    """The orthonormal Hadamard matrix of half the width."""
    matrix = torch.tensor(linalg.hadamard(like.shape[-1] // 2), dtype=torch.float64)
    return (matrix * len(matrix) ** -0.5).to(like)


PLAIN: dict[str, Callable[[Tensors, Tensors], Tensor]] = {
    "linear": lambda x, c: F.linear(x["x"], x["weight"], x["bias"]),
    "linear_without_bias": lambda x, c: F.linear(x["x"], x["weight"]),
    "linear_per_head": lambda x, c: torch.cat(
        [F.linear(part, w, b) for part, w, b in zip(x["x"].chunk(2, -1), x["weight"], x["bias"], strict=True)], -1
    ),
    "matmul": lambda x, c: torch.matmul(x["a"], x["b"]),
    "add": lambda x, c: x["a"] + x["b"],
    "mul": lambda x, c: x["a"] * x["b"],
    "scale": lambda x, c: x["x"] * 0.125,
    "divide": lambda x, c: x["x"] / c["d"],
    "hadamard": lambda x, c: (x["x"].unflatten(-1, (2, -1)) @ sylvester(x["x"])).flatten(-2),
    "mean": lambda x, c: x["x"].mean(1, keepdim=True),
    "mean_of_some": lambda x, c: mean_of_some(x["x"], c["where"]),
    "layer_norm": lambda x, c: F.layer_norm(x["x"], x["x"].shape[-1:], x["weight"], x["bias"], 1e-5),
    "softmax": lambda x, c: F.softmax(x["x"], -1),
    "softmax_masked": lambda x, c: masked_softmax(x["x"], c["mask"]),
    "softmax_sink": lambda x, c: sink_softmax(x["x"], c["mask"], x["sink"]),
    "clip_stretch": lambda x, c: torch.clamp(1.2 * x["p"] - 0.1, 0, 1),
    "clip_stretch_by_row": lambda x, c: torch.clamp((1 - c["gamma"]) * x["p"] + c["gamma"], 0, 1),
    "gelu": lambda x, c: F.gelu(x["x"]),
    "relu": lambda x, c: F.relu(x["x"]),
    "sigmoid": lambda x, c: F.sigmoid(x["x"]),
    "tanh": lambda x, c: F.tanh(x["x"]),
    "cross_entropy": lambda x, c: mean_nll(x["logits"], c["targets"]),
    "cross_entropy_of_some": lambda x, c: mean_nll(x["logits"], c["targets"]),
    "soft_cross_entropy": lambda x, c: (c["weights"] * -F.log_softmax(x["logits"], -1)).sum(-1).mean(),
    "embedding": lambda x, c: F.embedding(c["index"], x["table"]),
    "split_heads": lambda x, c: torch.stack(x["x"].chunk(2, -1), 1),
    "merge_heads": lambda x, c: torch.cat(x["x"].unbind(1), -1),
    "spread_heads": lambda x, c: x["x"].repeat_interleave(3, -1),
    "swap_last": lambda x, c: x["x"].mT,
    "reshape": lambda x, c: x["x"].flatten(1),
    "concat": lambda x, c: torch.cat([x["a"], x["b"]], 1),
    "token": lambda x, c: x["x"][:, 1],
    "select": lambda x, c: x["a"] * c["where"] + x["b"] * ~c["where"],
}


def errors(
    called: Callable[[Tensors], Tensor],
    plain: Callable[[Tensors], Tensor],
    reference: evaluate_ref.Function,
    leaves: Leaves,
    bound: tuple[float, str],
    context: Context,
) -> list[Verdict]:
    """Value and gradients of the backend, and of the reference in float32, against the reference in float64.

    Where a gradient is 0 by theory, its noise is held beside the largest of the other gradients.
    """
    inputs = round_leaves(leaves, context)
    truth, true_grads = evaluate_ref.value_and_gradients(reference, inputs)
    other, other_grads = value_and_gradients(plain, leaves, context)
    got = {"torch": value_and_gradients(called, leaves, context)}
    if context.dtype == "float32":
        got["ref"] = evaluate_ref.value_and_gradients(reference, inputs, "float32")
    c, why = bound
    reason, eps = f"2x plain torch, or c = {c}: {why}", EPS[context.dtype]
    largest = max(float(np.abs(g).max()) for g in true_grads.values())
    verdicts = []
    for who, (value, grads) in got.items():
        verdicts.append(against_truth(f"{who} value", value, truth, eps, c, reason, other))
        for name, g in grads.items():
            what, scale = f"{who} gradient of {name}", None if true_grads[name].any() else largest
            verdicts.append(against_truth(what, g, true_grads[name], eps, c, reason, other_grads[name], scale))
    return verdicts


def check_op(name: str, context: Context) -> list[Verdict]:
    op = operations(16)[name]
    held = {key: tensor(value, context) for key, value in op.consts.items()}
    consts: dict[str, Any] = {k: array(v.double()) if v.is_floating_point() else array(v) for k, v in held.items()}
    return errors(
        lambda x: op.call(ops, x, held),
        lambda x: PLAIN[name](x, held),
        lambda x: op.call(ref_ops, x, consts),
        op.leaves,
        op.bound,
        context,
    )


def check_total(context: Context) -> list[Verdict]:
    x = operations(16)["gelu"].leaves
    bound = 1e-6, "summed in float64"
    return errors(
        lambda x: ops.total(x["x"]),
        lambda x: x["x"].double().sum(),
        lambda x: ref_ops.total(x["x"]),
        x,
        bound,
        context,
    )


def check_patches(context: Context) -> list[Verdict]:
    image = np.arange(2 * 3 * 8 * 8, dtype=np.float32).reshape(2, 3, 8, 8)
    got = ops.patches(torch.from_numpy(image).to(context.device), 4)
    return [exact("value", array(got), ref_ops.patches(image, 4))]


def check_transform_bits(context: Context) -> list[Verdict]:
    """Sums and differences in one order: the same bits, for every block of two widths; and an IEEE division."""
    verdicts = []
    for width, blocks in ((48, (2, 4, 8, 16)), (128, (2, 64, 128))):
        x = stream(0, "hadamard", width).standard_t(2, size=(2, 5, width)).astype(np.float32)
        d = stream(0, "divisor", width).lognormal(size=width).astype(np.float32)
        got = ops.divide(torch.from_numpy(x).to(context.device), torch.from_numpy(d).to(context.device))
        verdicts.append(exact(f"{width} divided", array(got), x / d))
        for block in blocks:
            got = ops.hadamard(torch.from_numpy(x).to(context.device), block)
            verdicts.append(exact(f"{width} in blocks of {block}", array(got), ref_ops.hadamard(const(x), block).value))
    return verdicts


def list_cases() -> list[Case]:
    both = ("float32", "bfloat16")
    rows = [Case("ops", name, "torch", partial(check_op, name), both) for name in PLAIN]
    return [
        *rows,
        Case("ops", "total", "torch", check_total, both),
        Case("ops", "patches", "torch", check_patches),
        Case("ops", "transform_bits", "torch", check_transform_bits),
    ]
