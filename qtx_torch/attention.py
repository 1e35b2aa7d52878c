"""Attention variants: masks, and how probabilities are made from scores.

Differs from the reference: Mask, make_mask, masked_probabilities, attend_fused: kernels want a mask in several forms.
Differs from the reference: Codes, Drop, attend_tiled, can_tile: it stores the probabilities.
Differs from the reference: device: where a mask is made.

Bondarenko et al. 2023 (arXiv 2306.12929) section 4: clipped softmax (eq. 4). The gates of eq. 5 are in `models.gate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qtx_ref.spec import MASKS, AttentionSpec, Softmax

from . import ops, random, tiles
from .tracing import is_traced

WIDEST = 256  # columns of a head that the kernels take
MANY = 2**20  # scores of a head
LEAST = 2**19  # scores, of a batch and all its heads, below which a CPU is quicker with all of them at once


def attention_mask(
    rows: Tensor | None, queries: int, keys: int, causal: bool, device: torch.device | None = None
) -> Tensor:
    """Which key each query may attend to, boolean, broadcasting to (B, H, queries, keys).

    rows (B, keys) is true at real tokens, None where all are. The queries are the last of the keys' positions.
    """
    mask = torch.ones((1, 1, queries, keys), dtype=torch.bool, device=device if rows is None else rows.device)
    if causal:
        mask = mask.tril(keys - queries)
    return mask if rows is None else mask & rows[:, None, None, :]


def boolean_mask(mask: Tensor) -> Tensor:
    """A boolean mask as it is; an additive one with 0 as true and -10000 and below as false.

    Raises ValueError naming the first other value, or an unsigned dtype, which has no negative number: a mask of 0 and
    1 is not read as either kind.
    """
    if mask.dtype == torch.bool:
        return mask
    if not (mask.dtype.is_signed and not mask.dtype.is_complex):
        raise ValueError(f"attention mask is {str(mask.dtype).removeprefix('torch.')}: {MASKS}")
    if not mask.is_floating_point():
        mask = mask.long()  # -10000 has to exist
    other = mask[~((mask == 0) | (mask <= -10000))]
    if other.numel():
        raise ValueError(f"attention mask holds {other[0].item()}: {MASKS}")
    return mask == 0


class Mask:
    """A forward pass's mask in the forms that kernels want, each made once and shared by the layers."""

    def __init__(
        self,
        allowed: Tensor,
        dtype: torch.dtype,
        *,
        full: bool = False,
        triangle: bool = False,
        rows: Tensor | None = None,
        causal: bool = False,
    ) -> None:
        """allowed as `attention_mask` gives it; full: all of it is true; triangle: it is the lower triangle. rows and
        causal: what it was made of."""
        self.allowed = allowed
        self.dtype = dtype
        self.full = full
        self.triangle = triangle
        self.rows = rows
        self.causal = causal or triangle
        self.made: dict[str, Tensor | None] = {}

    @property
    def empty(self) -> Tensor | None:
        """True at queries without keys, (B, 1, Tq, 1); None where there are none (compiled: can be none)."""

        def find() -> Tensor | None:
            empty = ~self.allowed.any(dim=-1, keepdim=True)
            return empty if is_traced() or empty.any() else None

        return None if self.full or self.triangle else self._once("empty", find)

    @property
    def hidden(self) -> Tensor:
        """True at keys to be hidden: all that are masked, but none from a query without keys."""
        return self._once("hidden", lambda: ~(self.allowed if self.empty is None else self.allowed | self.empty))

    @property
    def bias(self) -> Tensor | None:
        """0 where allowed and -inf where not, to be added to scores; None where there is nothing to add.

        Queries without keys have 0 throughout, as a row of -inf would become NaN: `close` puts zeros in their results.
        """

        def make() -> Tensor:
            zeros = torch.zeros(self.hidden.shape, dtype=self.dtype, device=self.hidden.device)
            return zeros.masked_fill_(self.hidden, -math.inf)

        return None if self.full else self._once("bias", make)

    @property
    def keys(self) -> Tensor:
        """How many keys each query may attend to, at least 1, float64 (B or 1, 1, Tq, 1)."""
        return self._once("keys", lambda: self.allowed.sum(dim=-1, keepdim=True).clamp(min=1).double())

    def find_gamma(self, spec: AttentionSpec) -> Tensor | float:
        """The clipped softmax's gamma: the spec's, or each row's own, -alpha / number of keys, float64 (B or 1, 1, Tq,
        1)."""
        return -spec.alpha / self.keys if spec.softmax is Softmax.CLIPPED_ROW else spec.gamma

    def _once(self, name: str, make: Callable[[], Tensor | None]) -> Tensor | None:
        """What `make` gives, at the first call. Not `functools.cached_property`, whose lock (before Python 3.12)
        `torch.compile` does not trace."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def hide(self, scores: Tensor) -> Tensor:
        """scores (B, H, Tq, Tk) with -inf at masked keys, whatever was there; as they are at queries without keys."""
        return scores if self.full else scores.masked_fill(self.hidden, -math.inf)

    def close(self, x: Tensor) -> Tensor:
        """x (B, H, Tq, n) with zeros at queries without keys."""
        return x if self.empty is None else x.masked_fill(self.empty, 0)


def make_mask(rows: Tensor | None, queries: int, keys: int, causal: bool, like: Tensor) -> Mask:
    """The mask of a forward pass, in the dtype and on the device of `like`."""
    allowed = attention_mask(rows, queries, keys, causal, like.device)
    triangle = causal and queries == keys and rows is None
    full = rows is None and (not causal or queries == 1)
    mask = Mask(allowed, like.dtype, full=full, triangle=triangle, rows=rows, causal=causal)
    # now: a block that is computed again may not add to what lies outside it
    if is_traced() and like.dtype.is_floating_point:
        _ = mask.empty, mask.hidden, mask.bias, mask.keys
    return mask


def probabilities(scores: Tensor, mask: Tensor, spec: AttentionSpec, sink: Tensor | None = None) -> Tensor:
    """Attention probabilities of scaled scores (B, H, Tq, Tk) under a boolean mask that broadcasts against them.

    Softmax, softmax1 (a sink of logit 0), a learned sink per head (H,), or the clipped softmax with the spec's gamma or
    with each row's own, -alpha / number of keys. Rows without keys give zeros in every variant.
    """
    m = Mask(mask, scores.dtype)
    return masked_probabilities(m.hide(scores), m, spec, sink)


def masked_probabilities(scores: Tensor, mask: Mask, spec: AttentionSpec, sink: Tensor | None) -> Tensor:
    """`probabilities` of scores whose masked keys are hidden."""
    if spec.softmax is Softmax.PLUS_ONE:
        p = ops.softmax(scores, sink=scores.new_zeros(1))
    elif spec.softmax is Softmax.SINK:
        p = ops.softmax(scores, sink=sink.reshape(-1, 1, 1))
    elif spec.softmax is Softmax.PLAIN:
        p = ops.softmax(scores)
    else:
        p = ops.clipped_softmax(scores, mask.find_gamma(spec), spec.zeta)
    return mask.close(p)


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in one kernel: q (B, H, Tq, K), k and v (B, H, Tk, K) -> (B, H, Tq, K)."""
    bias = None if mask.triangle else mask.bias
    return mask.close(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=mask.triangle))


@dataclass(frozen=True)
class Codes:
    """A static quantizer of one range under QTX: scale and zero point of one element, and the limits of codes."""

    scale: Tensor
    zero_point: Tensor
    code_min: int
    code_max: int


@dataclass(frozen=True)
class Drop:
    """Dropout of probabilities: `random.keep_mask` of (seed, step, site, elements). `first` is the word of the first
    element of (B, H, Tq, Tk); a step or a first word may be a tensor, int64 without axes."""

    seed: int
    step: int | Tensor
    site: str
    rate: float  # > 0
    first: int | Tensor


def can_tile(q: Tensor, k: Tensor) -> bool:
    """Whether `attend_tiled` serves q (B, H, Tq, K) and k (B, H, Tk, K) better than what stores the scores. On a CPU a
    compiled graph fuses what it stores, and tiny tiles would be mostly calls. On a GPU float32, whose products in
    Triton are not the tensor cores', is served where scores are many."""
    if random.has_kernels(q.device):
        few = q.dtype == torch.float32 and q.shape[2] * k.shape[2] < MANY
        return q.dtype != torch.float64 and not few and q.shape[-1] <= WIDEST
    if is_traced() or torch.jit.is_tracing():
        return False
    return q.device.type == "cpu" and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] >= LEAST


def attend_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    spec: AttentionSpec,
    sink: Tensor | None,
    drop: Drop | None,
    *,
    gate: Tensor | None = None,
    scores: Codes | None = None,
    probs: Codes | None = None,
    quantizers: tiles.Quantizers | None = None,
    block: int = tiles.BLOCK,
) -> Tensor:
    """dropout(probabilities(q k^T / sqrt(K))) v, of any softmax, without a tensor of Tq x Tk: q (B, H, Tq, K), k and v
    (B, H, Tk, K), sink (H,) or None -> (B, H, Tq, K) in q's dtype. block: scores that a tile holds on the CPU.

    Where `random.has_kernels`: times gate (B, Tq, H), and of scores and probabilities that are quantized. On a CPU:
    `quantizers` of rows of scores and probabilities.

    Gradients of the clipped softmax, by row: with c_j = clip(z p_j + gamma), z = zeta - gamma, o = sum_j c_j v_j and
    g the gradient of o, dc_j = g . v_j and dp_j = z dc_j where 0 <= c_j <= 1 was not clamped, else 0. The softmax needs
    sum_j p_j dp_j. Inside the clip z p_j = c_j - gamma, beyond its top c_j = 1, below its bottom c_j = 0, so

        sum_j p_j dp_j = sum_inside (c_j - gamma) g . v_j = g . (o - w1 - gamma u),

    u being the sum of v over keys inside the clip and w1 over those beyond its top. Who cannot hold a row, as a GPU,
    stores o - w1 - gamma u in the forward pass, a vector of K a row, and reads p once in the backward pass; with
    dropout each v_j there is multiplied by the mask's element over 1 - rate. A tile on the CPU holds whole rows and
    sums p_j dp_j while they are in the cache.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if random.has_kernels(q.device):
        if not mask.full and not mask.causal and mask.rows is None:
            raise ValueError("attention mask is of no rows and not causal: kernels take what `make_mask` makes")
        from .kernels import attention as kernels  # Triton's, where it is; a compiler traces this statement

        words = None
        if drop is not None:
            words = kernels.Words(drop.seed, drop.step, random.number_site(drop.site), drop.rate, drop.first)
        coded = (codes and (codes.scale, codes.zero_point, codes.code_min, codes.code_max) for codes in (scores, probs))
        return kernels.attend(q, k, v, mask.rows, mask.causal, spec, sink, words, gate, *coded)
    gamma: Tensor | float | None = None
    span: Tensor | float | None = None
    if spec.softmax in (Softmax.CLIPPED, Softmax.CLIPPED_ROW):
        gamma, span = ops.stretch(mask.find_gamma(spec), spec.zeta, torch.promote_types(q.dtype, torch.float32))
    elif spec.softmax is Softmax.PLUS_ONE:
        sink = q.new_zeros(1).expand(q.shape[1])
    keep = None
    if drop is not None:

        def keep(first: int, shape: tuple[int, ...]) -> Tensor:
            return random.keep_mask(
                drop.seed, drop.step, drop.site, shape, drop.rate, drop.first + first, torch.device("cpu")
            )

    quantizers = quantizers or tiles.Quantizers()
    causal = mask.causal and not any(quantizers)  # a range is that of all keys, zeros in the future among them
    hidden = None if mask.full or (mask.triangle and causal) else mask.hidden
    rule = tiles.RowRule(hidden, causal, gamma, span, keep, 0.0 if drop is None else drop.rate, quantizers)
    return mask.close(tiles.Attend.apply(q, k, v, sink, rule, block))
