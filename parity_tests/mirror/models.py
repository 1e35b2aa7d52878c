"""torch's models against the reference: output, loss and every gradient by name, for small models of every kind."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from parity_tests.proof.case import Case, Context
from parity_tests.proof.verdict import (
    EPS,
    Verdict,
    against_truth,
    equal,
    exact,
    relative,
    within,
)
from parity_tests.subjects import plain_torch, small_models
from qtx_ref import backend as ref_backend
from qtx_ref.spec import Head, ModelSpec, Softmax
from qtx_torch import backend

FLOAT64 = 1e-12, "the same sums in another order in float64, through two layers"
OUTPUT = 4.0, "float32 through two layers, a dozen sums and norms: 2x plain torch, or c = 4"
LOSS = 4.0, "differences of float32 logits, of size 4 beside a loss of 1: 2x plain torch, or c = 4"
GRADIENT = 32.0, "an entry sums terms of all positions and units, which cancel: 2x plain torch, or c = 32"
NOTHING = "moving all keys moves a query's scores as a whole: (nearly) 0 by theory, and noise as of the key's weight"


def no_gradient(name: str, spec: ModelSpec) -> bool:
    """Whether the loss does not depend on the parameter: a key bias, where a row of scores may be moved as a whole."""
    moved = (Softmax.PLAIN, Softmax.CLIPPED, Softmax.CLIPPED_ROW)
    return name.endswith(".key.bias") and spec.attention.softmax in moved


def largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def check_float64(name: str, context: Context) -> list[Verdict]:
    """In float64 hardly anything is left but the formulas: torch, and plain torch, are held to the reference."""
    small = small_models.build(name)
    spec, params, batch = small.spec, small.params, small.batch
    ref = ref_backend.Model(spec, params, dtype="float64")
    model = backend.Model(spec, params, device=context.device, dtype="float64")
    output, loss, grads = plain_torch.run(spec, params, batch, context.device, torch.float64)
    want = ref.forward(batch)
    verdicts = [
        relative("output", model.forward(batch), want, *FLOAT64),
        relative("plain output", output, want, *FLOAT64),
    ]
    if spec.head is Head.NONE:
        return verdicts
    want_loss, want_grads = ref.gradients(batch)
    got_loss, got = model.gradients(batch)
    verdicts += [relative("loss", got_loss, want_loss, *FLOAT64), relative("plain loss", loss, want_loss, *FLOAT64)]
    verdicts.append(equal("sums, counts, hits", model.evaluate(batch)[1:], ref.evaluate(batch)[1:]))
    verdicts.append(equal("names", sorted(got), sorted(want_grads)))
    for who, own in (("", got), ("plain ", grads)):
        for key, g in want_grads.items():
            if no_gradient(key, spec):
                noise = 1e-12 * largest(want_grads[key.replace("bias", "weight")])
                verdicts += [within(f"{who}gradient of {key}", own[key], np.zeros_like(g), noise, NOTHING)]
            else:
                verdicts.append(relative(f"{who}gradient of {key}", own[key], g, *FLOAT64))
    return verdicts


def check_float32(name: str, context: Context) -> list[Verdict]:
    """float32 errors of torch and of the reference, beside plain torch's, against the reference in float64."""
    small = small_models.build(name)
    spec, params, batch = small.spec, small.params, small.batch
    truth = ref_backend.Model(spec, params, dtype="float64")
    models = {
        "torch": backend.Model(spec, params, device=context.device),
        "ref": ref_backend.Model(spec, params),
    }
    output, loss, grads = plain_torch.run(spec, params, batch, context.device, torch.float32)
    want, eps = truth.forward(batch), EPS["float32"]
    verdicts = [
        against_truth(f"{who} output", m.forward(batch), want, eps, *OUTPUT, output) for who, m in models.items()
    ]
    if spec.head is Head.NONE:
        return verdicts
    want_loss, want_grads = truth.gradients(batch)
    for who, model in models.items():
        got_loss, got = model.gradients(batch)
        verdicts.append(against_truth(f"{who} loss", got_loss, want_loss, eps, *LOSS, loss))
        for key, g in want_grads.items():
            nothing = key.endswith(".key.bias")
            scale = largest(want_grads[key.replace("bias", "weight")]) if nothing else None
            c, reason = (GRADIENT[0], NOTHING) if nothing else GRADIENT
            verdicts.append(against_truth(f"{who} gradient of {key}", got[key], g, eps, c, reason, grads[key], scale))
    return verdicts


def check_records(name: str, context: Context) -> list[Verdict]:
    """Every named tensor: the same sites in the same order, the same masks, and in float64 the same values."""
    small = small_models.build(name)
    want = ref_backend.Model(small.spec, small.params, dtype="float64").record(small.batch)
    got = backend.Model(small.spec, small.params, device=context.device, dtype="float64").record(small.batch)
    verdicts = [equal("sites", list(got), list(want))]
    for site, (value, where) in want.items():
        x, mask = got[site]
        counted = np.broadcast_to(True if where is None else where, value.shape)
        verdicts.append(exact(f"mask of {site}", np.broadcast_to(True if mask is None else mask, value.shape), counted))
        verdicts.append(relative(site, x, value, *FLOAT64))
    return verdicts


def list_cases() -> list[Case]:
    names = small_models.specs()
    rows = [Case("models", f"{name}_float64", "torch", partial(check_float64, name)) for name in names]
    rows += [Case("models", name, "torch", partial(check_float32, name)) for name in names]
    return rows + [Case("models", f"{name}_sites", "torch", partial(check_records, name)) for name in names]
