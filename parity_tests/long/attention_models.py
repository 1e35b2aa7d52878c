"""Models whose attention the kernels compute, beside the same models without; see `attention_kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch

from parity_tests.proof.verdict import EPS, Verdict, against_truth, equal, holds
from parity_tests.subjects import small_models
from qtx.recipes.named import recipe, resolve
from qtx_ref import backend as ref_backend
from qtx_ref.spec import Gate, ModelSpec, OptimSpec, StepSpec
from qtx_torch import attention, backend, numerics, random
from qtx_torch.numerics import Float

NAMES = ("opt_sink_and_mlp", "bert_clipped", "bert_gate_head", "bert_gate_head_conditional", "vit_clipped_row")
BOUND = 4.0, "two layers, each of whose scores are rounded once more"
FLIPS = "a code near a tie may flip, and flips compound"


def differentiate(model: backend.Model, batch: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    loss, grads = model.backward(model.accept(batch), partial(Float, training=True, seed=1))
    return loss.item(), {name: grad.float().cpu().numpy() for name, grad in grads.items()}


def check_models(device: str, names: tuple[str, ...] = NAMES) -> Iterator[Verdict]:
    """Loss and every gradient with dropout, beside the eager ones' error; the loss in w8a8, whose scores and
    probabilities the kernels quantize."""
    for name in names:
        small = small_models.build(name)
        spec = replace(small.spec, attention_dropout=0.1)
        truth, true_grads = ref_backend.Model(spec, small.params, dtype="float64").gradients(
            small.batch, training=True, seed=1
        )
        model = backend.Model(spec, small.params, device=device)
        with mock.patch.object(random, "has_kernels", lambda device: False):
            plain, plain_grads = differentiate(model, small.batch)
            eager = quantize(spec, small, device)
            want = differentiate(eager, small.batch)[0]
        with count_calls() as calls:
            loss, grads = differentiate(model, small.batch)
            yield equal(f"{name}: calls of the kernels", len(calls), spec.layers)
            gated = sum(call.kwargs["gate"] is not None for call in calls)
            yield equal(f"{name}: gates in them", gated, 0 if spec.attention.gate is Gate.NONE else spec.layers)
            yield holds(f"{name}: w8a8", abs(differentiate(eager, small.batch)[0] / want - 1), 1e-3, FLIPS)
            scaled = [call for call in calls if call.kwargs["scores"] is not None and call.kwargs["probs"] is not None]
            yield equal(f"{name}: calls that quantize", len(scaled), spec.layers)
        yield against_truth(f"{name}: loss", loss, truth, EPS["float32"], *BOUND, plain)
        largest = max(float(np.abs(g).max()) for g in true_grads.values())
        for key, g in grads.items():
            given = (EPS["float32"], *BOUND, plain_grads[key], largest)
            yield against_truth(f"{name}: gradient of {key}", g, true_grads[key], *given)


def check_compiled(device: str) -> Iterator[Verdict]:
    """A step with dropout traced with the kernels in it: what it takes from the modules a compiler has to follow."""
    small = small_models.build("bert_clipped")
    spec = replace(small.spec, attention_dropout=0.1)
    optim = OptimSpec(lr=1e-3, steps=10)
    results = []
    with (
        mock.patch.object(random, "has_kernels", lambda device: True),
        mock.patch.object(attention, "MANY", 0),
        mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")),
    ):
        for compiled in (True, False):
            model = backend.Model(spec, small.params, device=device)
            trainer = backend.Trainer(model, optim, seed=1, step=StepSpec(compiled=compiled))
            results.append([trainer.step(small.batch)[0] for _ in range(2)])
    for step, (got, want) in enumerate(zip(*results, strict=True)):
        yield holds(f"compiled: loss of step {step}", abs(got / want - 1), 1e-5, "float noise, through AdamW")


def quantize(spec: ModelSpec, small: small_models.SmallModel, device: str) -> backend.Model:
    """The model in w8a8, calibrated on its batch."""
    model = backend.Model(spec, small.params, device=device)
    quants = resolve(recipe("w8a8", spec), spec)
    model.bind(quants, model.calibrate([small.batch], quants))
    return model


@contextmanager
def count_calls() -> Iterator[list[Any]]:
    """Within, tiles are the kernels', on a CPU and for few scores too: the list of their calls."""
    with (
        mock.patch.object(random, "has_kernels", lambda device: True),
        mock.patch.object(attention, "MANY", 0),
        mock.patch.object(numerics, "attend_tiled", wraps=attention.attend_tiled) as tiled,
    ):
        yield tiled.call_args_list
