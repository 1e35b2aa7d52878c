"""The reference's gradients against float64 central differences: every op, attention and gate, and whole models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from parity_tests.proof.case import Case, Context
from parity_tests.proof.evaluate_ref import Function, Leaves, central_differences, value_and_gradients
from parity_tests.proof.verdict import Verdict, relative, within
from parity_tests.subjects import small_models
from parity_tests.subjects.attentions import GATES, SITUATIONS, SOFTMAXES, attention_inputs, gate_inputs
from parity_tests.subjects.operations import operations
from qtx_ref import models, ops
from qtx_ref.backend import Model
from qtx_ref.numerics import Float
from qtx_ref.random import stream

STEP = 1e-5
REASON = "central differences with h = 1e-5 in float64 are good to about 1e-10; inputs are away from kinks"
ALONG = "1e-6 of the gradient's norm; and 1e-9 for the differences of a loss near 3: eps 3 / 2h and h^2 f''' / 6"


def check_gradients(function: Function, leaves: Leaves) -> list[Verdict]:
    """Every leaf's gradient within 1e-6 of its largest entry."""
    _, grads = value_and_gradients(function, leaves)
    slopes = central_differences(function, leaves, STEP)
    return [_compare(name, grads[name], slopes[name]) for name in leaves]


def _compare(name: str, gradient: np.ndarray, slope: np.ndarray) -> Verdict:
    if np.abs(gradient).max() < 1e-12:  # nothing flows: one token, or a row that attends to nothing
        return within(
            f"gradient of {name}", gradient, slope, 1e-9, "a gradient of 0: rounding of the differences, eps f / h"
        )
    return relative(f"gradient of {name}", gradient, slope, 1e-6, REASON)


def check_op(name: str, context: Context) -> list[Verdict]:
    op = operations(1)[name]
    return check_gradients(lambda x: op.call(ops, x, op.consts), op.leaves)


def check_total(context: Context) -> list[Verdict]:
    return check_gradients(lambda x: ops.total(x["x"]), {"x": stream(0, "total").normal(size=(3, 4))})


def check_attention(softmax: str, situation: str, context: Context) -> list[Verdict]:
    inputs = attention_inputs(softmax, situation, 1)
    return check_gradients(inputs.reference, inputs.leaves)


def check_gate(kind: str, context: Context) -> list[Verdict]:
    inputs = gate_inputs(kind, 1)
    return check_gradients(inputs.reference, inputs.leaves)


def check_model(name: str, context: Context) -> list[Verdict]:
    """The loss along one random unit direction of each parameter tensor."""
    small = small_models.build(name)
    model = Model(small.spec, small.params, dtype="float64")
    _, grads = model.gradients(small.batch)

    def loss(name: str, moved: np.ndarray) -> float:
        nx = Float()
        nx.load(model.weights | {name: moved})
        return float(models.loss(models.forward(nx, small.spec, small.batch), small.batch).value)

    verdicts = []
    for key, value in model.weights.items():
        u = stream(0, "direction", key).normal(size=value.shape)
        u /= np.linalg.norm(u)
        slope = (loss(key, value + STEP * u) - loss(key, value - STEP * u)) / (2 * STEP)
        bound = 1e-6 * float(np.linalg.norm(grads[key])) + 1e-9
        verdicts.append(within(f"gradient of {key}", float((grads[key] * u).sum()), slope, bound, ALONG))
    return verdicts


def list_cases() -> list[Case]:
    def rows(group: str, named: dict[str, Callable[[Context], list[Verdict]]]) -> list[Case]:
        return [Case(group, f"{name}_gradient", "ref", run) for name, run in named.items()]

    return [
        *rows("ops", {name: partial(check_op, name) for name in operations(1)} | {"total": check_total}),
        *rows(
            "attention",
            {f"{s}_{at}": partial(check_attention, s, at) for s in SOFTMAXES for at in SITUATIONS}
            | {f"gate_{kind}": partial(check_gate, kind) for kind in GATES},
        ),
        *rows("models", {n: partial(check_model, n) for n, s in small_models.specs().items() if s.head != "none"}),
    ]
