"""Numerics: the arithmetic that a model asks for.

Differs from the reference: site, module, attn, Float.load: a site's module knows its site and holds its parameters.
Differs from the reference: has_int8, int8: a step by int8 products is torch's.
Differs from the reference: Numerics, Float.begin: torch's integers have no numerics of floats above them.
Differs from the reference: Float.operand, Float.weight, Float.named, Record, Quantizer, Calibrate,
FakeQuant, is_weight: hooks are modules in a site's slots, not methods of the numerics.
Differs from the reference: transforms, transform_input, Transformed: so are the transforms of inputs.
Differs from the reference: Float.takes_gate, Float.gated_attention: where a kernel does both.

A model is wiring. It hands every computation to one of these objects together with the site that comes out. `Float`
computes. What a site's slots hold sees operands, weights and results, and the model goes on with what it returns:

    Record     shows a tensor to a callback
    Calibrate  feeds it to an observer, with or without quantizing it
    FakeQuant  quantizes and dequantizes it, with a straight-through gradient
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from qtx_ref.spec import (
    QTX,
    AttentionSpec,
    Gate,
    Gradients,
    Granularity,
    InputTransform,
    Profile,
    Quant,
    QuantSpec,
    Range,
    Softmax,
    is_local,
)

from . import ops, random
from .attention import Codes, Drop, Mask, attend_fused, attend_tiled, can_tile, masked_probabilities
from .quant import blocks, gradients, int8, quantizer
from .quant.observers import Observer
from .quant.straight_through import OwnRanges, Unclamped, fake_quantize, learned_quantize
from .sites import SiteModule
from .tiles import Quantizers

LEAST_QUANTIZED = 2**17  # scores of a head, below which a CPU quantizes all of them at once
BEYOND = 1e38  # of a range whose ends lie as far apart float32 has no length
ACTIVATIONS = {"gelu": ops.gelu, "relu": ops.relu, "sigmoid": ops.sigmoid, "tanh": ops.tanh}


class Float:
    """Plain arithmetic. `training` turns dropout on, drawn from (seed, step, site, element), elements being counted in
    the whole batch: `first_row` is there the first row of what is computed. A compiled pass takes step and first row as
    tensors, int64 without axes."""

    def __init__(
        self,
        *,
        training: bool = False,
        seed: int = 0,
        step: int | Tensor = 0,
        first_row: int | Tensor = 0,
        gradients: Gradients | None = None,
        int8: bool = False,
    ) -> None:
        self.gradients = gradients
        self.int8 = int8
        self.training = training
        self.seed = seed
        self.step = step
        self.first_row = first_row
        self.rows: Tensor | None = None
        self.spared: Tensor | None = None

    def begin(self, rows: Tensor | None, spared: Tensor | None = None) -> None:
        """Starts a forward pass. rows (B, T) is true at real tokens, None where all are; spared (B, T) at those whose
        activations stay in float and enter no range, None where none do."""
        self.rows, self.spared = rows, spared

    def _where(self, y: Tensor) -> Tensor | None:
        """The rows that are real, as a mask for (B, T, ...) tensors."""
        if self.rows is None or y.ndim != 3 or y.shape[:2] != self.rows.shape:
            return None
        return self.rows[:, :, None]

    def _spared(self, y: Tensor) -> Tensor | None:
        """The rows of spared tokens, as a mask for (B, T, ...) tensors and, of heads, (B, H, T, ...); scores and
        probabilities are their queries'. None where a tensor has no such rows."""
        if self.spared is None:
            return None
        if y.ndim == 3 and y.shape[:2] == self.spared.shape:
            return self.spared[:, :, None]
        if y.ndim == 4 and (y.shape[0], y.shape[2]) == self.spared.shape:
            return self.spared[:, None, :, None]
        return None

    def _pairs(self, mask: Mask) -> Tensor:
        """The (query, key) pairs that count: allowed by the mask, from a real query."""
        allowed = mask.allowed
        return allowed if self.rows is None else allowed & self.rows[:, None, -allowed.shape[-2] :, None]

    def _heads(self) -> Tensor | None:
        """The rows that are real, as a mask for (B, H, T, K) tensors."""
        return None if self.rows is None else self.rows[:, None, :, None]

    def _named(self, module: SiteModule, y: Tensor) -> Tensor:
        return self._hand(module.on_output, y, self._where(y))

    def _hand(self, hook: nn.Module | None, x: Tensor, where: Tensor | None) -> Tensor:
        """What a slot makes of a tensor; itself where the slot is empty."""
        return x if hook is None else hook(x, where, self._spared(x))

    def backward(self, module: SiteModule) -> gradients.Backward | None:
        """How the backward pass of a site's matmul quantizes; None where it does not."""
        if self.gradients is None:
            return None
        return gradients.Backward(self.gradients, module.site, self.seed, self.step, self.first_row)

    def _linear(self, module: SiteModule, x: Tensor, w: Tensor) -> Tensor:
        how = self.backward(module)
        if how is None:
            return ops.linear(x, w, module.bias)
        return gradients.linear(x, w, module.bias, how, self._where(x))

    # ops --------------------------------------------------------------------------------------------------------------

    def input(self, module: SiteModule, value: Tensor) -> Tensor:
        """An input that is itself a tensor of the model."""
        return self._named(module, value)

    def parameter(self, module: SiteModule) -> Tensor:
        """The site's bias, where a parameter is itself a tensor of the model."""
        return self._named(module, module.bias)

    def linear(self, module: SiteModule, x: Tensor, *, weight: Tensor | None = None, named: bool = True) -> Tensor:
        """x W^T + b with the site's weight (or the tied parameter `weight`) and its bias, if there is one."""
        if module.transform is not None:
            x = module.transform(x)
        w = module.weight if weight is None else weight
        if self.int8 and self.spared is None and has_int8(module, w):
            specs = module.on_input.spec, module.on_weight.spec
            y = int8.linear(x, w, module.bias, specs, self.backward(module), self._where(x))
        else:
            x = self._hand(module.on_input, x, self._where(x))
            y = self._linear(module, x, self._weight(module, w))
        return self._named(module, y) if named else y

    def _weight(self, module: SiteModule, w: Tensor) -> Tensor:
        return w if module.on_weight is None else module.on_weight(w, None)

    def embedding(self, module: SiteModule, index: Tensor) -> Tensor:
        """Rows of the site's weight."""
        return self._named(module, ops.embedding(self._weight(module, module.weight), index))

    def norm(self, module: SiteModule, x: Tensor, eps: float) -> Tensor:
        return self._named(module, ops.layer_norm(x, self._weight(module, module.weight), module.bias, eps))

    def add(self, module: SiteModule, a: Tensor, b: Tensor) -> Tensor:
        return self._named(module, ops.add(a, b))

    def mul(self, module: SiteModule, a: Tensor, b: Tensor) -> Tensor:
        return self._named(module, ops.mul(a, b))

    def mean(self, module: SiteModule, x: Tensor) -> Tensor:
        """Mean over the real tokens, (B, T, C) -> (B, 1, C)."""
        return self._named(module, ops.mean(x, axis=1, where=self._where(x)))

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """factor x. No site: what it scales has one."""
        return ops.scale(x, factor)

    def prepend(self, module: SiteModule, x: Tensor) -> Tensor:
        """The site's weight (D,) as one more token in front: (B, N, D) -> (B, N + 1, D)."""
        first = module.weight.to(x.dtype).expand(x.shape[0], 1, -1)  # (D,) -> (B, 1, D)
        return self._named(module, ops.concat([first, x], axis=1))

    def activation(self, module: SiteModule, x: Tensor, kind: str) -> Tensor:
        """gelu, relu, sigmoid or tanh."""
        return self._named(module, ACTIVATIONS[kind](x))

    def dropout(self, module: SiteModule, x: Tensor, rate: float) -> Tensor:
        """While training: zero with probability `rate`, else x / (1 - rate)."""
        if not self.training or rate == 0:
            return x
        first = self.first_row * math.prod(x.shape[1:])
        keep = random.keep_mask(self.seed, self.step, module.site, tuple(x.shape), rate, first, x.device)
        return ops.scale(ops.mul(x, keep), 1 / (1 - rate))  # of the mask a byte is kept for the gradient, of x nothing

    def _drop(self, module: SiteModule, q: Tensor, k: Tensor, rate: float) -> Drop:
        """Dropout of the probabilities, as `dropout` draws it."""
        first = self.first_row * (q.shape[1] * q.shape[2] * k.shape[2])
        return Drop(self.seed, self.step, module.site, rate, first)

    def softmax(self, module: SiteModule, scores: Tensor, mask: Mask, spec: AttentionSpec) -> Tensor:
        """Probabilities of scores whose masked keys are hidden; the site has the sink, if there is one."""
        probs = masked_probabilities(scores, mask, spec, getattr(module, "sink", None))
        return self._hand(module.on_output, probs, self._pairs(mask))

    def attention(
        self, attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Mask, spec: AttentionSpec, rate: float
    ) -> Tensor:
        """softmax(q k^T / sqrt(K)) v: q (B, H, Tq, K), k and v (B, H, Tk, K) -> (B, Tq, H K).

        Sites `scores` (scaled, before the mask), `probs`, `context`. Dropout follows the clip. One fused kernel, or
        tiles, where nobody wants to see or change what lies between q, k, v and the context.

        At a key that is masked from a query, finite v, and k of finite scores, change no bit of its result. NaN or
        infinity in v makes it NaN, 0 times either being NaN (tiles pass over keys of the future); in k it changes
        nothing (in the fused kernel, which adds -inf to scores, it may make NaN, never another number). Nothing passes
        from one sequence or head to another.
        """
        p, c = attn.probs, attn.context
        codes = self._codes(attn, q)
        drop = self._drop(p, q, k, rate) if self.training and rate else None
        if codes == (None, None) and spec.softmax is Softmax.PLAIN and drop is None:
            context = attend_fused(q, k, v, mask)
        elif codes is not None and can_tile(q, k):
            context = self._attend_tiled(attn, q, k, v, mask, spec, drop, codes)
        elif (rows := self._row_quantizers(attn, q, k)) is not None:
            q, k = self._hand_operands(attn, q, k)
            v = self._hand(c.on_rhs, v, self._heads())
            context = attend_tiled(q, k, v, mask, spec, getattr(p, "sink", None), drop, quantizers=rows)
        else:
            probs = self._probs(attn, q, k, mask, spec, rate)
            probs = self._hand(c.on_lhs, probs, self._pairs(mask))
            v = self._hand(c.on_rhs, v, self._heads())
            how = self.backward(c)  # (B, H, Tq, Tk) (B, H, Tk, K) -> (B, H, Tq, K)
            if how is None:
                context = ops.matmul(probs, v)
            else:
                context = gradients.matmul(probs, v, how, self._pairs(mask), self._heads())
        return self._named(attn.context, ops.merge_heads(context))

    def _codes(self, attn: nn.Module, q: Tensor) -> tuple[Codes | None, Codes | None] | None:
        """The quantizers of scores and of probabilities, where nobody else wants to see or change what lies between q,
        k, v and the context, and tiles can do it; None elsewhere."""
        s, p, c = attn.scores, attn.probs, attn.context
        if self.gradients is not None or any(slot is not None for slot in (s.on_lhs, s.on_rhs, c.on_lhs, c.on_rhs)):
            return None
        slots = (s.on_output, p.on_output)
        if slots == (None, None):
            return None, None
        codes = tuple(slot.codes if isinstance(slot, FakeQuant) else None for slot in slots)
        unknown = any(slot is not None and found is None for slot, found in zip(slots, codes, strict=True))
        return None if unknown or self.spared is not None or not random.has_kernels(q.device) else codes

    def _row_quantizers(self, attn: nn.Module, q: Tensor, k: Tensor) -> Quantizers | None:
        """On a CPU, the quantizers of scores, of probabilities and of the context's left operand, where each takes
        every row by itself and nobody else wants to see or change those; None elsewhere."""
        if q.device.type != "cpu" or not can_tile(q, k) or q.shape[2] * k.shape[2] < LEAST_QUANTIZED:
            return None
        slots = (attn.scores.on_output, attn.probs.on_output, attn.context.on_lhs)
        rows = all(slot is None or (isinstance(slot, FakeQuant) and slot.by_row) for slot in slots)
        half = q.dtype.itemsize == 2 or torch.is_autocast_enabled(q.device.type)
        if not rows or half or self.gradients is not None or self.spared is not None:
            return None
        return Quantizers(*(slot and partial(slot, where=None) for slot in slots))

    def _attend_tiled(
        self,
        attn: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        spec: AttentionSpec,
        drop: Drop | None,
        codes: tuple[Codes | None, Codes | None],
        gate: Tensor | None = None,
    ) -> Tensor:
        sink = getattr(attn.probs, "sink", None)
        return attend_tiled(q, k, v, mask, spec, sink, drop, gate=gate, scores=codes[0], probs=codes[1])

    def takes_gate(
        self, attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Mask, spec: AttentionSpec, rate: float
    ) -> bool:
        """Whether one kernel does attention and a gate of heads: where nobody wants to see the context before the gate,
        and attention alone would be no other kernel's."""
        if spec.gate in (Gate.NONE, Gate.ELEMENTWISE) or not isinstance(q, Tensor) or not random.has_kernels(q.device):
            return False
        other = spec.softmax is Softmax.PLAIN and not (self.training and rate)
        unseen = attn.context.on_output is None and attn.gated.on_output is None and self._codes(attn, q) is not None
        return unseen and not other and can_tile(q, k)

    def gated_attention(
        self,
        attn: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        spec: AttentionSpec,
        rate: float,
        opening: Tensor,
    ) -> Tensor:
        """`attention`, each head times its opening (..., H), where `takes_gate`: (B, Tq, H K)."""
        drop = self._drop(attn.probs, q, k, rate) if self.training and rate else None
        gate = opening.expand(q.shape[0], q.shape[2], q.shape[1])
        context = self._attend_tiled(attn, q, k, v, mask, spec, drop, self._codes(attn, q), gate)
        return ops.merge_heads(context)

    def _hand_operands(self, attn: nn.Module, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Of the scores."""
        heads = self._heads()
        return self._hand(attn.scores.on_lhs, q, heads), self._hand(attn.scores.on_rhs, k, heads)

    def _probs(self, attn: nn.Module, q: Tensor, k: Tensor, mask: Mask, spec: AttentionSpec, rate: float) -> Tensor:
        module = attn.scores
        q, k = self._hand_operands(attn, q, k)
        factor, how, heads = q.shape[-1] ** -0.5, self.backward(module), self._heads()
        if how is None:
            scores = ops.scores(q, k, factor)
        else:
            columns = None if heads is None else heads.transpose(-1, -2)
            scores = ops.scale(gradients.matmul(q, ops.swap_last(k), how, heads, columns), factor)
        if module.on_output is not None:
            scores = self._hand(module.on_output, scores, self._pairs(mask))
            scores = mask.hide(scores)
        elif not mask.full:
            scores = scores.masked_fill_(mask.hidden, -math.inf)  # nobody else holds them
        return self.dropout(attn.probs, self.softmax(attn.probs, scores, mask, spec), rate)


class Record(nn.Module):
    """Shows a site's result to `callback(site, value, where)`; of a spared token no element counts."""

    def __init__(self, site: str, callback: Callable[[str, Tensor, Tensor | None], None]) -> None:
        super().__init__()
        self.site = site
        self.callback = callback

    def forward(self, x: Tensor, where: Tensor | None, spared: Tensor | None = None) -> Tensor:
        self.callback(self.site, x, leave_out(where, spared))
        return x


def leave_out(where: Tensor | None, spared: Tensor | None) -> Tensor | None:
    """The elements that count (None: all) without those of `spared` (None: none)."""
    if spared is None:
        return where
    return ~spared if where is None else where & ~spared


class Transformed(nn.Module):
    """A linear's input x as (x / divisor) R, before anything sees it."""

    def __init__(self, how: InputTransform) -> None:
        super().__init__()
        self.block = how.block
        self.register_buffer("divisor", None if how.divisor is None else torch.tensor(np.asarray(how.divisor)))

    def forward(self, x: Tensor) -> Tensor:
        if self.divisor is not None:
            x = ops.divide(x, self.divisor)
        return ops.hadamard(x, self.block) if self.block else x


class Quantizer(nn.Module):
    """What `Calibrate` and `FakeQuant` share: a slot's key, `site`, and its spec. Their `apply_to` is what happens
    there, but to the rows of spared tokens."""

    def __init__(self, site: str, spec: Quant, *, masked_scores: bool = False, profile: Profile = QTX) -> None:
        super().__init__()
        self.site = site
        self.spec = spec
        self.profile = QTX if profile == QTX else profile  # itself: its kernels are shorter
        self.is_weight = site.endswith(".weight")
        self.everywhere = masked_scores and site.endswith(".scores")

    def forward(self, x: Tensor, where: Tensor | None, spared: Tensor | None = None) -> Tensor:
        y = self.apply_to(x, leave_out(None if self.everywhere else where, spared))
        return y if spared is None else ops.select(spared, x, y)

    def dynamic(self, x: Tensor, where: Tensor | None) -> Tensor:
        """By the tensor's own range. One that is not finite becomes NaN throughout: a run that diverges shows it in its
        loss."""
        try:
            if self.profile is QTX and blocks.has_rows(x, self.spec, self.is_weight):
                return OwnRanges.apply(x, self.spec)
            scale, zero_point = quantizer.dynamic_scale(x.detach(), self.spec, where, self.is_weight, self.profile)
        except ValueError:
            if x.detach().abs().max() < BEYOND:  # something else is wrong
                raise
            return x * math.nan
        if self.profile is QTX and quantizer.holds_all(self.spec, where):
            return Unclamped.apply(x, scale, zero_point)
        return fake_quantize(x, scale, zero_point, self.spec, self.profile)


def has_int8(module: SiteModule, weight: Tensor) -> bool:
    """Whether a linear's input and weight are fake-quantized to codes that int8 products take."""
    hooks = module.on_input, module.on_weight
    if weight.ndim != 2 or not all(isinstance(hook, FakeQuant) and hook.profile is QTX for hook in hooks):
        return False
    if module.on_input.spec.granularity is not Granularity.TOKEN:  # a channel's scale varies along the sum
        return False
    return all(int8.has_codes(hook.spec) for hook in hooks)


class Calibrate(Quantizer):
    """Feeds an observer, if the range is static; `quantize` passes on what the range so far makes of the tensor."""

    def __init__(self, site: str, spec: Quant, *, quantize: bool = False, masked_scores: bool = False) -> None:
        super().__init__(site, spec, masked_scores=masked_scores)
        self.quantize = quantize
        self.observer = Observer(spec, self.is_weight)
        self.scale: tuple[Tensor, ...] | None = None  # of a weight, once seen; empty where nothing is quantized

    def apply_to(self, x: Tensor, where: Tensor | None) -> Tensor:
        if self.spec.dynamic:
            return self.dynamic(x, where) if self.quantize else x
        if self.scale is None:
            try:
                self.observer.update(x, where)
                scale = self.observer.scale_zero() if self.quantize else ()
            except ValueError as error:
                raise ValueError(f"site {self.site}: {error}") from None
            if self.is_weight:  # the same in every batch
                self.scale = scale
        else:
            scale = self.scale
        return fake_quantize(x, *scale, self.spec) if scale else x

    def range(self) -> Range:
        """The range of the batches so far. Raises ValueError naming the site where no batch has reached it."""
        if not self.observer.shape:
            raise ValueError(f"site {self.site} was not reached in calibration; is it a site of this model?")
        low, high = self.observer.range()
        return Range(low, high, *self.observer.scale_zero())


class FakeQuant(Quantizer):
    """Quantize-dequantize: a static site by its range, a dynamic one by the tensor itself, a learned one by
    parameters; by the rules of a profile."""

    def __init__(
        self, site: str, spec: Quant, range: Range | None, *, masked_scores: bool = False, profile: Profile = QTX
    ) -> None:
        """range: tensors; None where the spec is dynamic."""
        super().__init__(site, spec, masked_scores=masked_scores, profile=profile)
        if spec.learned:
            self.scale = nn.Parameter(range.scale.float())
            self.zero_point = nn.Parameter(range.zero_point.float())
        elif not spec.dynamic:
            self.register_buffer("scale", range.scale)
            self.register_buffer("zero_point", range.zero_point)

    @property
    def codes(self) -> Codes | None:
        """Of uniform codes of one static range, of up to 8 bits, under QTX; else None."""
        spec = self.spec
        static = isinstance(spec, QuantSpec) and not (spec.dynamic or spec.learned or spec.outliers is not None)
        watched = self._forward_hooks or self._forward_pre_hooks
        if not static or watched or spec.bits > 8 or self.profile is not QTX or self.scale.numel() != 1:
            return None
        return Codes(self.scale, self.zero_point, spec.code_min, spec.code_max)

    @property
    def by_row(self) -> bool:
        """Whether a row's values are its own matter, whatever else is there, and nobody watches the module."""
        spec, watched = self.spec, self._forward_hooks or self._forward_pre_hooks
        if watched or (isinstance(spec, QuantSpec) and (spec.learned or spec.outliers is not None)):
            return False
        return is_local(spec) if spec.dynamic else self.scale.numel() == 1

    def apply_to(self, x: Tensor, where: Tensor | None) -> Tensor:
        if self.spec.dynamic:
            return self.dynamic(x, where)
        quantize = learned_quantize if self.spec.learned else fake_quantize
        return quantize(x, self.scale, self.zero_point, self.spec, self.profile)
