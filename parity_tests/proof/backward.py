"""Teacher forcing of a whole training step: going forward as in `teacher`, and going back each quantizer of a gradient
product is fed the reference's tensor, is compared, and hands on the reference's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from parity_tests.proof import teacher
from parity_tests.proof.case import Context
from parity_tests.proof.evaluate_torch import array, tensor
from parity_tests.proof.verdict import Verdict, exact, relative_rms
from qtx_ref import models as ref_models
from qtx_ref.backend import Model as RefModel
from qtx_ref.quant import gradients as ref_gradients
from qtx_ref.spec import FloatQuantSpec
from qtx_ref.tape import backward, leaf
from qtx_torch import models, numerics
from qtx_torch.backend import Model
from qtx_torch.quant import gradients
from qtx_torch.sites import swap_hooks

Batch = dict[str, np.ndarray]
CHAIN = 1e-5, "float32 ops between two forced quantizers, of which differences cancel a digit or two"


@dataclass(frozen=True)
class Passed:
    """An operand of a gradient product: as it came, the words it was rounded with, and what was made of it."""

    before: np.ndarray
    words: np.ndarray | None
    after: np.ndarray
    scale: np.ndarray | None  # None where it is not quantized
    codes: np.ndarray | None


@dataclass(frozen=True)
class Step:
    """What the reference did in one training step. `operands` by (site, operand)."""

    crossings: dict[str, teacher.Crossing]
    operands: dict[tuple[str, str], Passed]
    loss: float
    grads: dict[str, np.ndarray]


class RecordBackward(ref_gradients.Backward):
    """Keeps every operand in `operands`."""

    operands: dict[tuple[str, str], Passed]

    def quantize(
        self,
        name: str,
        x: np.ndarray,
        axis: int,
        words: np.ndarray | None = None,
        where: np.ndarray | None = None,
    ) -> np.ndarray:
        after = super().quantize(name, x, axis, words, where)
        operand, scale, codes = getattr(self.gradients, name), None, None
        if operand is not None:
            scale = ref_gradients.quantize_operand(x, axis, operand.quant, words, where)[1].swapaxes(axis, -1)
            codes = codes_of(after, scale, operand.quant)
        self.operands[self.site, name] = Passed(x, words, after, scale, codes)
        return after


def codes_of(values: np.ndarray, scale: np.ndarray, quant: object) -> np.ndarray:
    """The codes that values stand for: whole numbers, or the small floats themselves."""
    ratio = values.astype(np.float64) / scale
    return ratio.astype(np.float32) if isinstance(quant, FloatQuantSpec) else np.rint(ratio).astype(np.int32)


class RecordStep(teacher.FakeQuant):
    """Keeps what the hooks see, and the operands of gradient products."""

    operands: dict[tuple[str, str], Passed]

    def backward(self, site: str) -> ref_gradients.Backward | None:
        if self.gradients is None:
            return None
        how = RecordBackward(self.gradients, site, self.seed, self.step, self.first_row)
        how.operands = self.operands
        return how


def record_step(model: RefModel, batch: Batch, *, seed: int = 0, step: int = 0) -> Step:
    """A training step of the reference under what it is bound to, up to its gradients."""
    given = {name: leaf(x) for name, x in model.trainable().items()}
    nx = RecordStep(
        model.quants,
        model.fixed,
        given,
        masked_scores=model.masked_scores,
        training=True,
        seed=seed,
        step=step,
        gradients=model.gradient_quants,
    )
    nx.crossings, nx.operands = {}, {}
    nx.load(given)
    inputs = model.accept(batch)
    loss = ref_models.loss(ref_models.forward(nx, model.spec, inputs), inputs)
    grads = dict(zip(given, backward(loss, given.values()), strict=True))
    return Step(nx.crossings, nx.operands, float(loss.value), grads)


class Replace(torch.autograd.Function):
    """Another tensor's values; the gradient passes as if they were its own."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class TrainingPupil(nn.Module):
    """A pupil through which gradients pass: by the quantizer that sits there, if there is one."""

    def __init__(self, pupil: teacher.Pupil) -> None:
        super().__init__()
        self.pupil = pupil

    def forward(self, x: Tensor, where: Tensor | None, spared: Tensor | None = None) -> Tensor:
        pupil = self.pupil
        with torch.no_grad():
            value = pupil(x.detach(), where, spared)
        if pupil.quantizer is None:
            return Replace.apply(x, value)
        given = Replace.apply(x, tensor(pupil.crossing.before, pupil.context))
        return Replace.apply(pupil.quantizer(given, where, spared), value)


class BackwardPupil(gradients.Backward):
    """Compares each operand, quantizes the reference's, and goes on with the reference's result."""

    step_taken: Step
    context: Context
    verdicts: list[Verdict]

    def quantize(
        self, name: str, x: Tensor, axis: int, words: Tensor | None = None, where: Tensor | None = None
    ) -> Tensor:
        want, key = self.step_taken.operands[self.site, name], f"{self.site}: {name}"
        before = tensor(want.before.reshape(x.shape), self.context)
        self.verdicts.append(relative_rms(f"{key}: as it came", array(x), array(before), *CHAIN))
        operand = getattr(self.gradients, name)
        if operand is not None:
            if words is not None:
                self.verdicts.append(exact(f"{key}: words", array(words), want.words.reshape(x.shape).astype(np.int64)))
            y, scale = gradients.quantize_operand(before, axis, operand.quant, words, where)
            scale = array(scale.transpose(axis, -1))
            codes = codes_of(array(y), scale, operand.quant)
            self.verdicts += [
                exact(f"{key}: scale", scale, want.scale.reshape(scale.shape)),
                exact(f"{key}: codes", codes, want.codes.reshape(codes.shape)),
                exact(f"{key}: values", array(y), want.after.reshape(x.shape)),
            ]
        return tensor(want.after.reshape(x.shape), self.context)


class ForcedFloat(numerics.Float):
    """A training pass whose gradient products have pupils."""

    step_taken: Step
    context: Context
    verdicts: list[Verdict]

    def backward(self, module: nn.Module) -> gradients.Backward | None:
        if self.gradients is None:
            return None
        how = BackwardPupil(self.gradients, module.site, self.seed, self.step, self.first_row)
        how.step_taken, how.context, how.verdicts = self.step_taken, self.context, self.verdicts
        return how


def force_step(model: Model, batch: Batch, want: Step, context: Context, *, seed: int = 0, step: int = 0) -> tuple:
    """Verdicts of the reference's step done again by torch, forced in both directions, the loss and the gradients."""
    hooks = {hook.site: hook for hook in model.net.modules() if isinstance(hook, numerics.FakeQuant)}
    pupils = teacher.seat(model, want.crossings, hooks, context)
    nx = ForcedFloat(training=True, seed=seed, step=step, gradients=model.gradient_quants)
    nx.step_taken, nx.context, nx.verdicts = want, context, []
    inputs, leaves = model.accept(batch), model.leaves()
    for value in leaves.values():
        value.grad = None
        value.requires_grad_(True)
    with swap_hooks(model.net, {key: TrainingPupil(pupil) for key, pupil in pupils.items()}):
        loss = models.loss(model.compute(nx, inputs), inputs)
        loss.backward()
    grads = {name: array(torch.zeros_like(x) if x.grad is None else x.grad) for name, x in leaves.items()}
    forward = [verdict for pupil in pupils.values() for verdict in pupil.verdicts]
    return forward + nx.verdicts, loss.item(), grads
