"""A compiled step beside the eager one, compiled integers beside the reference's codes.

    python -m parity_tests.long.compiled [--device DEVICE] [--only "in integers"]

Compiling takes minutes; the suite traces the same models without generating code, and compiles the draws and the
quantizers alone.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import torch
from torch._dynamo.utils import counters

from parity_tests.mirror.accumulation import OPTIM, PARTS, make_batches
from parity_tests.mirror.models import GRADIENT, LOSS, NOTHING, largest, no_gradient
from parity_tests.proof.verdict import EPS, Verdict, against_truth, equal, exact, holds
from parity_tests.subjects import integer_models, small_models
from qtx.prepare.calibration import bind
from qtx.recipes.named import training_recipe
from qtx_ref import backend as ref_backend
from qtx_ref import random as ref_random
from qtx_ref.spec import (
    FloatFormat,
    FloatQuantSpec,
    Granularity,
    Nonlinear,
    Output,
    QuantSpec,
    SpecError,
    StepSpec,
)
from qtx_torch import backend, random
from qtx_torch.integer.execution import Execution
from qtx_torch.numerics import Float
from qtx_torch.quant import quantizer
from qtx_torch.step import compile_forward

NAMES = ("bert_plain", "opt_plain", "vit_plain", "bert_clipped_alpha", "opt_sink_and_mlp")
QUANTS = {
    "per token": QuantSpec(granularity=Granularity.TOKEN, dynamic=True),
    "per tensor, symmetric": QuantSpec(symmetric=True, dynamic=True),
    "per channel, 4 bits": QuantSpec(4, granularity=Granularity.CHANNEL, dynamic=True),
    "float8": FloatQuantSpec(FloatFormat.E4M3, dynamic=True),
    "mxfp4": FloatQuantSpec(FloatFormat.E2M1, granularity=Granularity.BLOCK, block=8, dynamic=True),
}
INTEGERS = (
    "bert_plain", "opt_plain", "vit_plain", "bert_clipped_alpha", "vit_clipped_row", "bert_gate_mlp",
    "opt_sink_and_mlp", "bert_gate_head_conditional", "opt_post_norm_projected", "bert_classify",
)  # fmt: skip
CHOICES = (
    *((recipe, "qtx", Nonlinear.TABLE) for recipe in ("w8a8", "channels", "w8a8-channel-ffn16", "rows", "w8a16")),
    *(("w8a8", profile, Nonlinear.TABLE) for profile in ("float32", "gemmlowp", "tflite", "onnx")),
    *((recipe, "qtx", Nonlinear.POLYNOMIAL) for recipe in ("w8a8", "rows")),
)
DRAWS = ((1, 0), (3, 7), (2**31, 8))  # steps, first elements


def check_operations(device: str = "cpu", names: tuple[str, ...] = tuple(QUANTS)) -> Iterator[Verdict]:
    """Every bit of what is drawn and of what codes stand for: one graph for all steps and first elements."""
    rng = ref_random.stream(0, "compiled")
    x = torch.tensor(rng.standard_t(2, size=(5, 16)).astype(np.float32), device=device)

    def operate(x: torch.Tensor, step: torch.Tensor, first: torch.Tensor) -> dict[str, torch.Tensor]:
        words = random.bits(7, step, "a.site", x.numel(), first, x.device)
        keep = random.keep_mask(7, step, "a.site", tuple(x.shape), 0.1, first, x.device)
        codes = {
            name: quantizer.simulate(x, *quantizer.dynamic_scale(x, QUANTS[name], None, False), QUANTS[name])[0]
            for name in names
        }
        return {"words": words, "keep": keep} | codes

    counters.clear()
    run = compile_forward(operate)
    for step, first in DRAWS:
        got = run(x, *(torch.tensor(number, device=device) for number in (step, first)))
        want = ref_random.bits(7, step, "a.site", x.numel(), first)
        yield exact(f"words of step {step} from {first}", got.pop("words").cpu().numpy().astype(np.uint64), want)
        want = ref_random.keep_mask(7, step, "a.site", tuple(x.shape), 0.1, first)
        yield exact(f"mask of step {step} from {first}", got.pop("keep").cpu().numpy(), want)
        eager = operate(x, torch.tensor(step, device=device), torch.tensor(first, device=device))
        for name, values in got.items():
            signless = (y.cpu().numpy() + 0.0 for y in (values, eager[name]))  # compilers for CPUs lose the sign of 0
            yield exact(name, *signless)
    yield equal("graphs", counters["stats"]["unique_graphs"], 1)


def check_step(
    name: str, rate: float, recipe: str = "float", *, recompute: bool = False, device: str = "cpu"
) -> Iterator[Verdict]:
    """Loss and every gradient of a batch in parts, in float beside the eager ones' error; then steps on one graph."""
    small = small_models.build(name)
    spec = replace(small.spec, dropout=rate, attention_dropout=rate)
    batches = list(make_batches(spec, 4))
    counters.clear()

    def make(compiled: bool) -> backend.Trainer:
        model = backend.Model(spec, small.params, device=device)
        if recipe != "float":
            bind(model, training_recipe(recipe, spec), {})
        step = StepSpec(accumulate=PARTS, compiled=compiled, recompute=recompute)
        return backend.Trainer(model, OPTIM, seed=1, step=step)

    compiled, eager = make(True), make(False)

    def differentiate(trainer: backend.Trainer) -> tuple[float, dict[str, np.ndarray]]:
        inputs = trainer.model.accept(batches[0])
        loss, grads = trainer.model.backward(inputs, trainer._numerics, accumulate=PARTS)
        return loss.item(), {key: grad.cpu().numpy() for key, grad in grads.items()}

    if recipe == "float":
        truth = ref_backend.Model(spec, small.params, dtype="float64")
        want_loss, want = truth.gradients(batches[0], training=True, seed=1)
        (loss, grads), (plain_loss, plain) = differentiate(compiled), differentiate(eager)
        yield against_truth("loss", loss, want_loss, EPS["float32"], *LOSS, plain_loss)
        for key, g in want.items():
            nothing = no_gradient(key, spec)
            scale = largest(want[key.replace("bias", "weight")]) if nothing else None
            c, reason = (GRADIENT[0], NOTHING) if nothing else GRADIENT
            what = f"gradient of {key}"
            yield against_truth(what, grads[key], g, EPS["float32"], c, reason, plain[key], scale)
    for step, batch in enumerate(batches):
        loss, want_loss = compiled.step(batch)[0], eager.step(batch)[0]
        bound = 1e-5 if recipe == "float" else 1e-2
        reason = "float noise, through AdamW" if recipe == "float" else "a code near a tie may flip, and flips compound"
        yield holds(f"loss of step {step} beside eager", abs(loss / want_loss - 1), bound, reason)
    yield equal("graphs of the forward pass", counters["stats"]["unique_graphs"], 1)


def spoil_free_memory(device: str, size: int = 2**28) -> None:
    """Fills memory that is free and will be used again with NaN, in blocks of all sizes: who reads what nobody wrote
    shows it."""
    for log in range(9, 25):
        blocks = [torch.full((2**log // 4,), math.nan, device=device) for _ in range(min(size // 2**log, 512))]
        del blocks


def check_after_events(name: str, recipe: str, *, device: str = "cpu") -> Iterator[Verdict]:
    """The loss and the gradients' norm of one batch, again and again, each time after what must not matter to them: a
    wrong one names its cause.

    On a GPU under torch 2.11 the step after an evaluation was NaN, where a quantizer kept its levels, which later
    operations had changed in place: a graph that kept the tensor from before read memory that was free. Since only
    what goes in is kept, all of these hold there (an H200, torch 2.11, triton 3.6).
    """
    small = small_models.build(name)
    batch = next(iter(make_batches(small.spec, 1)))
    compiled, eager = (backend.Model(small.spec, small.params, device=device, dtype="bfloat16") for _ in range(2))
    for model in (compiled, eager):
        bind(model, training_recipe(recipe, small.spec), {})
    trainer = backend.Trainer(compiled, OPTIM, seed=1, step=StepSpec(compiled=True))

    def measure(model: backend.Model, make: Callable[..., Float]) -> tuple[float, float]:
        loss, grads = model.backward(model.accept(batch), make)
        return loss.item(), math.sqrt(sum(grad.double().square().sum().item() for grad in grads.values()))

    want = measure(eager, partial(Float, training=True, seed=1))
    events: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "free memory was spoiled": lambda: spoil_free_memory(device),
        "statistics": lambda: compiled.statistics(batch, {"embed.sum": "sequence"}, ("inf_norm",)),
        "an evaluation": lambda: compiled.evaluate(batch),
        "an evaluation, and free memory was spoiled": lambda: (compiled.evaluate(batch), spoil_free_memory(device)),
    }
    for what, happen in events.items():
        happen()
        for part, got, known in zip(("loss", "norm"), measure(compiled, trainer._numerics), want, strict=True):
            reason = "bfloat16, and a code near a tie may flip"
            yield holds(f"{part} after {what}, beside eager", abs(got / known - 1), 2e-2, reason)


def check_integers(
    name: str,
    choice: tuple,
    parts: tuple[str, ...] = ("all", "one", "two"),
    *,
    device: str = "cpu",
    backend_name: str = "inductor",
) -> Iterator[Verdict]:
    """A model in integers compiled, against the reference's codes: all of a padded batch, one sequence of it
    (a graph of its own), two shorter ones."""
    low = integer_models.small(name, *choice)
    model = low.model(backend.IntegerModel, device=device)
    meaning = low.spec, model.constants, model.quants, model.profile, model.device
    try:
        model.execution = Execution(model.net, *meaning, backend=backend_name)
    except SpecError as error:
        yield holds(f"refused: {error}", 0, 0, "with the site and the reason")
        return
    ref = low.model(ref_backend.IntegerModel)
    rows = {"all": slice(None), "one": slice(0, 1), "two": slice(1, 3)}
    for what in parts:
        some = rows[what]
        batch = {key: x[some, :5] if what == "two" and x.ndim == 2 else x[some] for key, x in low.batch.items()}
        for part, got, want in zip(Output._fields, model.run(batch), ref.run(batch), strict=True):
            yield exact(f"{what}: {part}", got, want)
        yield holds(f"{what} ran compiled", float(model.execution(model.accept(batch)) is None), 0, "not eagerly")


def list_checks(device: str) -> dict[str, Callable[[], Iterator[Verdict]]]:
    """The checks by name."""
    checks = {"operations": lambda: check_operations(device)}
    for name, rate in product(NAMES, (0.0, 0.1)):
        checks[f"{name}, dropout {rate}"] = lambda n=name, r=rate: check_step(n, r, device=device)
    checks["bert_plain under w8a8"] = lambda: check_step("bert_plain", 0.1, "w8a8", device=device)
    for name, recipe in product(("opt_plain", "bert_clipped_alpha"), ("w8a8", "w4a4")):
        after = f"{name} under {recipe}, after other things"
        checks[after] = lambda n=name, r=recipe: check_after_events(n, r, device=device)
    for name, choice in product(INTEGERS, CHOICES):
        title = f"{name} in integers, {', '.join(map(str, choice))}"
        checks[title] = lambda n=name, c=choice: check_integers(n, c, device=device)
    checks["opt_plain, recomputed"] = lambda: check_step("opt_plain", 0.1, recompute=True, device=device)
    return checks


def main() -> int:
    parser = argparse.ArgumentParser(description="a compiled step beside the eager one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="part of a check's name")
    given = parser.parse_args()
    failed = 0
    for name, check in list_checks(given.device).items():
        if given.only not in name:
            continue
        torch._dynamo.reset()
        begin = time.monotonic()
        verdicts = list(check())
        wrong = [verdict for verdict in verdicts if not verdict.ok]
        bounded = [v for v in verdicts if v.tolerance]
        worst = max(bounded, key=lambda v: v.error / v.tolerance, default=None)
        most = "" if worst is None else f", at most {worst.error / worst.tolerance:.3f} of a bound ({worst.what})"
        print(f"{name}: {len(verdicts) - len(wrong)} of {len(verdicts)}{most}, {time.monotonic() - begin:.0f} s")
        for verdict in wrong:
            print(f"    {verdict.what}: {verdict.measure} {verdict.error} above {verdict.tolerance}")
        failed += bool(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
