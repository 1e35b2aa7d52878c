"""20 training steps of the small presets in both backends, from the same 50 steps on, and AdamW by itself.

A smooth model runs freely in both. Where there are kinks (ReLU, clipping) one ulp may flip a derivative, and AdamW
makes a step of full size from the smallest difference: there each step starts from the reference's parameters, and how
far free runs part is reported beside the distance between float32 and float64 torch.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import torch

from parity_tests.mirror.models import NOTHING, largest, no_gradient
from parity_tests.proof.case import Case, Context
from parity_tests.proof.verdict import (
    EPS,
    Verdict,
    holds,
    relative,
    relative_rms,
    report,
    within,
)
from parity_tests.subjects.trained import ATTENTIONS, OPTIM, PRESETS, Trained, train_preset
from qtx_ref import backend as ref_backend
from qtx_torch import backend

Arrays = dict[str, np.ndarray]
LOSS = 5e-7, "the design's: a loss of float32 logits, reduced in float64"
DRIFT = 1e-5, "the design's: 20 free steps of a smooth model, through AdamW"
GRADIENT = 2e-2, "the design's: kinks, where one ulp flips a derivative"
ADAMW = 1e-6, "the design's: the same gradients; each of 20 updates rounds"
# seen on an H100: 1.3e-5 of v, up to 3.1e-6 of a parameter after 20 updates, 1.2e-6 of a loss
FUSED = 2e-5, "CUDA's fused AdamW takes 1 - beta2 in float32, which at 0.999 is 1.3e-5 less, and v with it"


def start_training(t: Trained, module: object, **where: str) -> tuple:
    """A model and a trainer of a backend, with the shared parameters and state."""
    model = module.Model(t.spec, t.params, **where)
    trainer = module.Trainer(model, OPTIM)
    trainer.load_state(t.state)
    return model, trainer


def check_steps(name: str, kind: str, context: Context) -> list[Verdict]:
    t = train_preset(name, kind, context)
    spec = t.spec
    ref, ref_trainer = start_training(t, ref_backend)
    model, trainer = start_training(t, backend, device=context.device)
    fed, fed_trainer = start_training(t, backend, device=context.device)
    pairs, verdicts = [], []
    for step, batch in enumerate(t.batches):
        loss, grads = ref.gradients(batch, training=True, step=ref_trainer.adam.count)
        forced = backend.Model(spec, ref.params(), device=context.device)
        forced_loss, forced_grads = forced.gradients(batch, training=True, step=ref_trainer.adam.count)
        free_loss, _ = trainer.step(batch)
        pairs.append((free_loss if spec.smooth else forced_loss, loss))
        verdicts += compare_gradients(f"step {step}", t, forced_grads, grads)
        fed_trainer.adam.step({key: torch.tensor(g, device=context.device) for key, g in grads.items()})
        ref_trainer.adam.step(grads)
    at = max(range(len(pairs)), key=lambda i: abs(pairs[i][0] - pairs[i][1]))
    verdicts.insert(0, relative(f"loss of step {at}", *pairs[at], *(LOSS if context.device == "cpu" else FUSED)))
    want = ref.params()
    for key, value in fed.params().items():
        verdicts.append(
            relative_rms(f"{key} by AdamW alone", value, want[key], *(ADAMW if context.device == "cpu" else FUSED))
        )
    if spec.smooth:
        for key, value in model.params().items():
            if not no_gradient(key, spec):
                verdicts.append(relative_rms(f"{key} after 20 steps", value, want[key], *DRIFT))
    else:
        verdicts += measure_drift(t, model.params(), want, context)
    before, after = (average_loss(t, params, context) for params in (t.params, want))
    return [
        *verdicts,
        holds("loss of the 20 batches after the steps over before", after / before, 1.0, "training lowers it"),
    ]


def average_loss(t: Trained, params: Arrays, context: Context) -> float:
    model = backend.Model(t.spec, params, device=context.device)
    return float(np.mean([total / count for total, count, _ in map(model.evaluate, t.batches)]))


def compare_gradients(step: str, t: Trained, got: Arrays, want: Arrays) -> list[Verdict]:
    """Each tensor's gradient from the same parameters; those that are 0 by theory below a bound in both backends."""
    verdicts = []
    for key, g in want.items():
        if no_gradient(key, t.spec):
            noise = 1024 * EPS["float32"] * largest(want[key.replace("bias", "weight")])
            zero = np.zeros_like(g)
            verdicts += [
                within(f"{who} gradient of {key}, {step}", x, zero, noise, NOTHING)
                for who, x in (("torch", got[key]), ("ref", g))
            ]
        else:
            verdicts.append(relative_rms(f"gradient of {key}, {step}", got[key], g, *GRADIENT))
    return verdicts


def measure_drift(t: Trained, free: Arrays, ref: Arrays, context: Context) -> list[Verdict]:
    """How far free runs part in 20 steps: torch from the reference, and float32 torch from float64 torch."""
    wide, wide_trainer = start_training(t, backend, device=context.device, dtype="float64")
    for batch in t.batches:
        wide_trainer.step(batch)
    verdicts = []
    for what, other in (("torch from ref", ref), ("torch from float64 torch", wide.params())):
        shares = {k: relative_rms(k, free[k], x, *DRIFT).error for k, x in other.items() if not no_gradient(k, t.spec)}
        worst = max(shares, key=shares.get)
        verdicts.append(report(f"free drift of {what}: {worst}", "relative rms", shares[worst], "kinks: no bound"))
    return verdicts


def list_cases() -> list[Case]:
    return [
        Case("steps", f"{name}_{kind}", "torch", partial(check_steps, name, kind))
        for name, kind in product(PRESETS, ATTENTIONS)
    ]
