"""A step in parts: 4 x 8 rows against 32 at once, in both backends, with unequal numbers of targets and padding.

One step is held to float64 beside what the whole batch gives in float32. 20 steps of a smooth model run freely; with
kinks (ReLU) each starts from where the whole batch has come, as in `mirror.steps`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from types import ModuleType

import numpy as np

from parity_tests.mirror.models import GRADIENT, LOSS, NOTHING, largest, no_gradient
from parity_tests.mirror.steps import DRIFT
from parity_tests.mirror.steps import GRADIENT as KINKED
from parity_tests.mirror.steps import LOSS as STEP_LOSS
from parity_tests.proof.case import Case, Context
from parity_tests.proof.verdict import EPS, Verdict, against_truth, equal, relative, relative_rms
from parity_tests.subjects import small_models
from qtx_ref import backend as ref_backend
from qtx_ref.models import count_targets
from qtx_ref.spec import Family, ModelSpec, OptimSpec, StepSpec
from qtx_torch import backend

ROWS, PARTS, STEPS = 32, 4, 20
OPTIM = OptimSpec(lr=1e-3, warmup=5, steps=100)
NAMES = ("bert_plain", "opt_plain", "vit_plain", "bert_sink_and_mlp")
RATES = (0.0, 0.1)
Arrays = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]


def make_batches(spec: ModelSpec, count: int) -> Iterator[Batch]:
    """Batches of 32 rows; of a text's, the parts have from 1/4 of the targets to more than half of them."""
    for i in range(count):
        batch = small_models.make_batch(spec, ROWS + i)
        yield {
            name: value[i:] if spec.family is Family.VIT else np.roll(value, 11 * i, 0)[:ROWS]
            for name, value in batch.items()
        }


def check_gradients(name: str, rate: float, context: Context) -> list[Verdict]:
    """Loss and every gradient of one step, against float64 and beside the whole batch's own error."""
    small = small_models.build(name)
    spec = replace(small.spec, dropout=rate, attention_dropout=rate)
    batch = next(make_batches(spec, 1))
    counts = [count_targets({key: x[i : i + 8] for key, x in batch.items()}) for i in range(0, ROWS, 8)]
    verdicts = [equal("parts differ in their targets", len(set(counts)) > 1, spec.family is not Family.VIT)]
    truth = ref_backend.Model(spec, small.params, dtype="float64")
    draws = {"training": True, "seed": 3, "step": 5}
    want_loss, want = truth.gradients(batch, **draws)
    models = {
        "ref": ref_backend.Model(spec, small.params),
        "torch": backend.Model(spec, small.params, device=context.device),
    }
    for who, model in models.items():
        whole_loss, whole = model.gradients(batch, **draws)
        loss, grads = model.gradients(batch, **draws, accumulate=PARTS)
        verdicts.append(against_truth(f"{who} loss", loss, want_loss, EPS["float32"], *LOSS, whole_loss))
        for key, g in want.items():
            nothing = no_gradient(key, spec)
            scale = largest(want[key.replace("bias", "weight")]) if nothing else None
            c, reason = (GRADIENT[0], NOTHING) if nothing else GRADIENT
            what = f"{who} gradient of {key}"
            verdicts.append(against_truth(what, grads[key], g, EPS["float32"], c, reason, whole[key], scale))
    return verdicts


def check_steps(name: str, rate: float, context: Context) -> list[Verdict]:
    """20 steps of each backend."""
    small = small_models.build(name)
    spec = replace(small.spec, dropout=rate, attention_dropout=rate)
    verdicts = []
    for who, module, where in (("ref", ref_backend, {}), ("torch", backend, {"device": context.device})):
        verdicts += compare_steps(who, module, spec, small.params, where)
    return verdicts


def compare_steps(
    who: str, module: ModuleType, spec: ModelSpec, params: Arrays, where: dict[str, str]
) -> list[Verdict]:
    whole, parts = (module.Model(spec, params, **where) for _ in range(2))
    trainer = module.Trainer(whole, OPTIM, seed=1)
    other = module.Trainer(parts, OPTIM, seed=1, step=StepSpec(accumulate=PARTS))
    verdicts = []
    for step, batch in enumerate(make_batches(spec, STEPS)):
        if not spec.smooth:
            model = module.Model(spec, whole.params(), **where)
            draws = {"training": True, "seed": 1, "step": step}
            (_, want), (_, got) = whole.gradients(batch, **draws), model.gradients(batch, **draws, accumulate=PARTS)
            for key, g in want.items():
                if not no_gradient(key, spec):
                    verdicts.append(relative_rms(f"{who} gradient of {key}, step {step}", got[key], g, *KINKED))
            other = module.Trainer(model, OPTIM, seed=1, step=StepSpec(accumulate=PARTS))
            other.load_state(trainer.state())
        (want_loss, _), (loss, _) = trainer.step(batch), other.step(batch)
        verdicts.append(relative(f"{who} loss of step {step}", loss, want_loss, *STEP_LOSS))
    if spec.smooth:
        got, want = parts.params(), whole.params()
        verdicts += [
            relative_rms(f"{who} {key} after {STEPS} steps", got[key], w, *DRIFT)
            for key, w in want.items()
            if not no_gradient(key, spec)
        ]
    return verdicts


def list_cases() -> list[Case]:
    checks = {"gradients": (check_gradients, NAMES), "steps": (check_steps, NAMES[:3])}
    return [
        Case("accumulation", f"{name}_dropout_{rate}_{what}", "torch", partial(check, name, rate))
        for what, (check, names) in checks.items()
        for name, rate in product(names, RATES)
    ]
