"""Teacher forcing: torch computes each tensor from the reference's operands, is compared, and is handed the
reference's.

The reference runs once and keeps what each hook was shown and what it passed on. A `Pupil` in each of torch's slots
then compares what torch computed there, quantizes the reference's tensor, and lets the model go on with the reference's
result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from parity_tests.proof.case import Context
from parity_tests.proof.evaluate_torch import array, tensor
from parity_tests.proof.verdict import EPS, Verdict, against_truth, exact
from qtx_ref import models as ref_models
from qtx_ref import numerics as ref_numerics
from qtx_ref.backend import Model as RefModel
from qtx_ref.quant import quantizer as ref_quantizer
from qtx_ref.tape import Var
from qtx_torch import numerics
from qtx_torch.backend import Model
from qtx_torch.quant import quantizer
from qtx_torch.sites import swap_hooks

OP = 4.0, "two float32 results of one op from the same operands: sums of n <= 512 products, c = 1 and more each"


@dataclass(frozen=True)
class Crossing:
    """A tensor as a hook saw it, as the hook passed it on, and which of its elements count."""

    before: np.ndarray
    after: np.ndarray
    where: np.ndarray | None


class Recording:
    """Mixed into one of the reference's numerics: keeps in `crossings`, by key and in order, what the hooks see."""

    crossings: dict[str, Crossing]

    def operand(self, site: str, x: Var, where: np.ndarray | None = None) -> Var:
        return self._keep(site, x, super().operand(site, x, where), where)

    def weight(self, site: str, w: Var) -> Var:
        return self._keep(site, w, super().weight(site, w), None)

    def named(self, site: str, y: Var, where: np.ndarray | None = None) -> Var:
        return self._keep(site, y, super().named(site, y, where), where)

    def _keep(self, site: str, before: Var, after: Var, where: np.ndarray | None) -> Var:
        self.crossings[site] = Crossing(before.value, after.value, where)
        return after


class Float(Recording, ref_numerics.Float):
    pass


class FakeQuant(Recording, ref_numerics.FakeQuant):
    pass


class Calibrate(Recording, ref_numerics.Calibrate):
    pass


def record(nx: Recording, model: RefModel, batch: dict[str, np.ndarray]) -> dict[str, Crossing]:
    """What the hooks of a numerics see in one forward pass of the reference."""
    nx.crossings = {}
    nx.load(model.weights)
    ref_models.forward(nx, model.spec, batch)
    return nx.crossings


class Pupil(nn.Module):
    """Sits in torch's slot `key`; `quantizer`, what would have sat there, is fed the reference's tensor."""

    def __init__(
        self, key: str, crossing: Crossing, quantizer: nn.Module | None, context: Context, cancelled: float = 0.0
    ) -> None:
        """cancelled: the size of terms that the op subtracts from each other, where they are larger than its result."""
        super().__init__()
        self.key, self.crossing, self.quantizer, self.context = key, crossing, quantizer, context
        self.scale = float(np.abs(crossing.before).max(initial=0.0)) + cancelled
        self.verdicts: list[Verdict] = []

    def forward(self, x: Tensor, where: Tensor | None, spared: Tensor | None = None) -> Tensor:
        before, after = self.crossing.before, self.crossing.after
        self.verdicts.append(against_truth(self.key, array(x), before, EPS["float32"], *OP, scale=self.scale))
        counted = np.broadcast_to(True if self.crossing.where is None else self.crossing.where, before.shape)
        seen = np.broadcast_to(True if where is None else array(where), before.shape)
        self.verdicts.append(exact(f"{self.key}: elements that count", seen, counted))
        if self.quantizer is not None:
            self.quantize(where, spared)
        return tensor(after, self.context)

    def quantize(self, where: Tensor | None, spared: Tensor | None) -> None:
        """The value that the quantizer passes on, to the bit."""
        y = self.quantizer(tensor(self.crossing.before, self.context), where, spared)
        self.verdicts.append(exact(f"{self.key}: passed on", array(y), self.crossing.after))


class QuantizerPupil(Pupil):
    """Of a `FakeQuant`: also its range, codes and gradient mask."""

    def quantize(self, where: Tensor | None, spared: Tensor | None) -> None:
        super().quantize(where, spared)
        key, hook, x = self.key, self.quantizer, self.crossing.before
        spec, given = hook.spec, tensor(x, self.context).requires_grad_()
        if spec.dynamic:
            apart = None if spared is None else array(spared)
            kept = ref_numerics.leave_out(None if hook.everywhere else self.crossing.where, apart)
            scale, zero = ref_quantizer.dynamic_scale(x, spec, kept, hook.is_weight)
            counted = numerics.leave_out(None if hook.everywhere else where, spared)
            got = quantizer.dynamic_scale(given.detach(), spec, counted, hook.is_weight)
            self.verdicts += [
                exact(f"{key}: scale", array(got[0]), scale),
                exact(f"{key}: zero point", array(got[1]), zero),
            ]
        else:
            scale, zero = array(hook.scale), array(hook.zero_point)
            zero = np.rint(zero).astype(np.int32)  # a learned one is a float, and rounded as it is used
        moved = tensor(scale, self.context), tensor(zero, self.context)
        codes = quantizer.quantize(given.detach(), *moved, spec)
        self.verdicts.append(exact(f"{key}: codes", array(codes), ref_quantizer.quantize(x, scale, zero, spec)))
        with torch.enable_grad():
            passes = torch.autograd.grad(hook(given, where, spared).sum(), given)[0] != 0
        inside = ref_quantizer.fake_quantize(x, scale, zero, spec)[1] | (False if spared is None else array(spared))
        self.verdicts.append(exact(f"{key}: gradient passes", array(passes), inside))


def seat(
    model: Model, crossings: dict[str, Crossing], hooks: dict[str, nn.Module], context: Context
) -> dict[str, Pupil]:
    """A pupil for every slot that was crossed; `hooks` are the quantizers or observers that would sit there."""
    kind = {key: QuantizerPupil if isinstance(hook, numerics.FakeQuant) else Pupil for key, hook in hooks.items()}
    stretch = max(
        abs(model.spec.attention.gamma), model.spec.attention.alpha or 0.0
    )  # gamma is taken from clipped probs
    pupils = {}
    for key, crossing in crossings.items():
        cancelled = stretch if key.endswith(".probs") else 0.0
        pupils[key] = kind.get(key, Pupil)(key, crossing, hooks.get(key), context, cancelled).to(context.device)
    return pupils


def force(
    model: Model,
    batch: dict[str, np.ndarray],
    crossings: dict[str, Crossing],
    hooks: dict[str, nn.Module],
    context: Context,
) -> list[Verdict]:
    """The verdicts of a forward pass of torch in which every slot has its pupil, in forward order."""
    pupils = seat(model, crossings, hooks, context)
    with swap_hooks(model.net, pupils):
        model.forward(batch)
    return [verdict for pupil in pupils.values() for verdict in pupil.verdicts]
