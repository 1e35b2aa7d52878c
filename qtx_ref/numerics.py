"""Numerics: the arithmetic that a model asks for.

A model is wiring. It hands every computation to one of these objects together with the name of the tensor that comes
out (its site); the object has the parameters. `Float` computes; its three hooks see each operand of a matmul, each
weight and each named result, and what they return is what the model goes on with:

    Record     shows tensors to a callback
    Calibrate  feeds them to observers, with or without quantizing them
    FakeQuant  quantizes and dequantizes them, with a straight-through gradient
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from . import ops, random
from .attention import probabilities
from .quant import gradients
from .quant.observers import Observer
from .quant.straight_through import dynamic_quantize, fake_quantize, learned_quantize
from .spec import QTX, AttentionSpec, Gradients, InputTransform, Profile, Quant, QuantSpec, Range
from .tape import V, Var, const

__all__ = [
    "ACTIVATIONS",
    "Calibrate",
    "FakeQuant",
    "Float",
    "Numerics",
    "Quantizers",
    "Record",
    "is_weight",
    "leave_out",
    "transform_input",
]

ACTIVATIONS = {"gelu": ops.gelu, "relu": ops.relu, "sigmoid": ops.sigmoid, "tanh": ops.tanh}


class Numerics(Protocol[V]):
    """What a model asks for, of values V: variables of the tape, or integer codes."""

    rows: np.ndarray | None = None
    spared: np.ndarray | None = None

    def begin(self, rows: np.ndarray | None, spared: np.ndarray | None = None) -> None:
        """Starts a forward pass. rows (B, T), boolean, is true at real tokens, None where all are; spared (B, T) at
        those whose activations stay in float and enter no range, None where none do."""
        self.rows, self.spared = rows, spared

    def input(self, site: str, value: np.ndarray) -> V:
        """The model's input (B, N, C), which is itself a tensor of the model."""

    def parameter(self, site: str) -> V:
        """`<site>.bias` (H,), where a parameter is itself a tensor of the model."""

    def linear(self, site: str, x: V, *, weight: str | None = None, named: bool = True) -> V:
        """x W^T + b: x (..., I) -> (..., O); one matrix (O, I), or one per head (H, O, I) on the head's own slice of x.

        `<site>.weight`, or the tied parameter `weight`, and `<site>.bias`, if there is one. named: the result is a
        tensor of the site.
        """

    def embedding(self, site: str, index: np.ndarray) -> V:
        """Rows of `<site>.weight` (V, D), by an index of integers (...): (..., D)."""

    def norm(self, site: str, x: V, eps: float) -> V:
        """LayerNorm over the last axis (Ba et al. 2016), with `<site>.weight` and `<site>.bias` (D,)."""

    def add(self, site: str, a: V, b: V) -> V:
        """a + b, broadcast."""

    def mul(self, site: str, a: V, b: V) -> V:
        """a b, broadcast."""

    def mean(self, site: str, x: V) -> V:
        """Mean over the real tokens, (B, T, C) -> (B, 1, C)."""

    def scale(self, x: V, factor: float) -> V:
        """factor x. No site: what it scales has one."""

    def prepend(self, site: str, x: V) -> V:
        """`<site>.weight` (D,) as one more token in front: (B, N, D) -> (B, N + 1, D)."""

    def activation(self, site: str, x: V, kind: str) -> V:
        """gelu, relu, sigmoid or tanh, element by element."""

    def dropout(self, site: str, x: V, rate: float) -> V:
        """While training: zero with probability `rate`, else x / (1 - rate)."""

    def attention(self, site: str, q: V, k: V, v: V, mask: np.ndarray, spec: AttentionSpec, rate: float) -> V:
        """softmax(q k^T / sqrt(K)) v: q (B, H, Tq, K), k and v (B, H, Tk, K) -> (B, Tq, H K). mask, boolean, broadcasts
        to (B, H, Tq, Tk). Sites `<site>.scores`, scaled and before the mask, `.probs` and `.context`."""

    def _where(self, y: V) -> np.ndarray | None:
        """The rows that are real, as a mask for (B, T, ...) tensors."""
        if self.rows is None or y.ndim != 3 or y.shape[:2] != self.rows.shape:
            return None
        return self.rows[:, :, None]

    def _spared(self, y: V) -> np.ndarray | None:
        """The rows of spared tokens, as a mask for (B, T, ...) tensors and, of heads, (B, H, T, ...); scores and
        probabilities are their queries'. None where a tensor has no such rows."""
        if self.spared is None:
            return None
        if y.ndim == 3 and y.shape[:2] == self.spared.shape:
            return self.spared[:, :, None]
        if y.ndim == 4 and (y.shape[0], y.shape[2]) == self.spared.shape:
            return self.spared[:, None, :, None]
        return None


class Float(Numerics[Var]):
    """Plain arithmetic. `training` turns dropout on, drawn from (seed, step, site, element), elements being counted in
    the whole batch: `first_row` is there the first row of what is computed. `transforms` are those of linears' inputs,
    by site; every numerics has them, for the weights are made for what they give."""

    def __init__(
        self,
        *,
        training: bool = False,
        seed: int = 0,
        step: int = 0,
        first_row: int = 0,
        transforms: Mapping[str, InputTransform] | None = None,
        gradients: Gradients | None = None,
    ) -> None:
        self.transforms = transforms or {}
        self.gradients = gradients
        self.training = training
        self.seed = seed
        self.step = step
        self.first_row = first_row
        self.params: dict[str, Var] = {}

    def load(self, params: Mapping[str, np.ndarray | Var]) -> None:
        """Takes a model's parameters by name, for the passes to come: arrays, or variables where gradients are
        wanted."""
        self.params = {name: x if isinstance(x, Var) else Var(x) for name, x in params.items()}

    # hooks ------------------------------------------------------------------------------------------------------------

    def operand(self, site: str, x: Var, where: np.ndarray | None = None) -> Var:
        """Sees an operand as it enters a matmul: `<site>.input`, or `.lhs` and `.rhs`."""
        return x

    def weight(self, site: str, w: Var) -> Var:
        """Sees a weight, `<site>.weight`, as it is used."""
        return w

    def named(self, site: str, y: Var, where: np.ndarray | None = None) -> Var:
        """Sees a result. `where` is true at elements that belong to real tokens; None where all do."""
        return y

    def _named(self, site: str, y: Var) -> Var:
        return self.named(site, y, self._where(y))

    def backward(self, site: str) -> gradients.Backward | None:
        """How the backward pass of a site's matmul quantizes; None where it does not."""
        if self.gradients is None:
            return None
        return gradients.Backward(self.gradients, site, self.seed, self.step, self.first_row)

    def _linear(self, site: str, x: Var, w: Var, bias: Var | None) -> Var:
        how = self.backward(site)
        return ops.linear(x, w, bias) if how is None else gradients.linear(x, w, bias, how, self._where(x))

    def _matmul(
        self, site: str, a: Var, b: Var, where_a: np.ndarray | None = None, where_b: np.ndarray | None = None
    ) -> Var:
        how = self.backward(site)
        return ops.matmul(a, b) if how is None else gradients.matmul(a, b, how, where_a, where_b)

    # ops --------------------------------------------------------------------------------------------------------------

    def input(self, site: str, value: np.ndarray) -> Var:
        """An input that is itself a tensor of the model."""
        return self._named(site, const(value))

    def parameter(self, site: str) -> Var:
        """`<site>.bias`, where a parameter is itself a tensor of the model."""
        return self._named(site, self.params[f"{site}.bias"])

    def linear(self, site: str, x: Var, *, weight: str | None = None, named: bool = True) -> Var:
        """x W^T + b with `<site>.weight` (or the tied parameter `weight`) and `<site>.bias`, if there is one."""
        if site in self.transforms:
            x = transform_input(x, self.transforms[site])
        x = self.operand(f"{site}.input", x, self._where(x))
        w = self.weight(f"{site}.weight", self.params[weight or f"{site}.weight"])
        y = self._linear(site, x, w, self.params.get(f"{site}.bias"))
        return self._named(site, y) if named else y

    def embedding(self, site: str, index: np.ndarray) -> Var:
        """Rows of `<site>.weight`."""
        return self._named(site, ops.embedding(self.weight(f"{site}.weight", self.params[f"{site}.weight"]), index))

    def norm(self, site: str, x: Var, eps: float) -> Var:
        gain = self.weight(f"{site}.weight", self.params[f"{site}.weight"])
        return self._named(site, ops.layer_norm(x, gain, self.params[f"{site}.bias"], eps))

    def add(self, site: str, a: Var, b: Var) -> Var:
        return self._named(site, ops.add(a, b))

    def mul(self, site: str, a: Var, b: Var) -> Var:
        return self._named(site, ops.mul(a, b))

    def mean(self, site: str, x: Var) -> Var:
        """Mean over the real tokens, (B, T, C) -> (B, 1, C)."""
        return self._named(site, ops.mean(x, axis=1, where=self._where(x)))

    def scale(self, x: Var, factor: float) -> Var:
        """factor x. No site: what it scales has one."""
        return ops.scale(x, factor)

    def prepend(self, site: str, x: Var) -> Var:
        """`<site>.weight` (D,) as one more token in front: (B, N, D) -> (B, N + 1, D)."""
        first = ops.add(self.params[f"{site}.weight"], const(np.zeros((x.shape[0], 1, 1), x.value.dtype)))  # (B, 1, D)
        return self._named(site, ops.concat([first, x], axis=1))

    def activation(self, site: str, x: Var, kind: str) -> Var:
        """gelu, relu, sigmoid or tanh."""
        return self._named(site, ACTIVATIONS[kind](x))

    def dropout(self, site: str, x: Var, rate: float) -> Var:
        """While training: zero with probability `rate`, else x / (1 - rate)."""
        if not self.training or rate == 0:
            return x
        first = self.first_row * int(np.prod(x.shape[1:]))
        keep = random.keep_mask(self.seed, self.step, site, x.shape, rate, first)
        return ops.mul(x, const((keep / (1 - rate)).astype(x.value.dtype)))

    def softmax(self, site: str, scores: Var, mask: np.ndarray, spec: AttentionSpec) -> Var:
        """`attention.probabilities` of scores (B, H, Tq, Tk), with the sink `<site>.sink`, if there is one."""
        return self.named(site, probabilities(scores, mask, spec, self.params.get(f"{site}.sink")), self._pairs(mask))

    def attention(self, site: str, q: Var, k: Var, v: Var, mask: np.ndarray, spec: AttentionSpec, rate: float) -> Var:
        """softmax(q k^T / sqrt(K)) v: q (B, H, Tq, K), k and v (B, H, Tk, K) -> (B, Tq, H K).

        Sites `scores` (scaled, before the mask), `probs`, `context`. Dropout follows the clip.

        At a key that is masked from a query, finite v, and k of finite scores, change no bit of its result. NaN or
        infinity in v makes it NaN, 0 times either being NaN; in k it changes nothing (in torch's fused kernel, which
        adds -inf to scores, it may make NaN, never another number). Nothing passes from one sequence or head to
        another.
        """
        heads = None if self.rows is None else self.rows[:, None, :, None]
        kt = ops.swap_last(self.operand(f"{site}.scores.rhs", k, heads))
        q = self.operand(f"{site}.scores.lhs", q, heads)
        columns = None if heads is None else heads.swapaxes(-1, -2)
        scores = ops.scale(self._matmul(f"{site}.scores", q, kt, heads, columns), q.shape[-1] ** -0.5)
        scores = self.named(f"{site}.scores", scores, self._pairs(mask))
        probs = self.softmax(f"{site}.probs", scores, mask, spec)
        probs = self.dropout(f"{site}.probs", probs, rate)
        probs = self.operand(f"{site}.context.lhs", probs, self._pairs(mask))
        v = self.operand(f"{site}.context.rhs", v, heads)
        context = self._matmul(f"{site}.context", probs, v, self._pairs(mask), heads)  # (B, H, Tq, K)
        return self._named(f"{site}.context", ops.merge_heads(context))

    def _pairs(self, mask: np.ndarray) -> np.ndarray:
        """The (query, key) pairs that count: allowed by the mask, from a real query."""
        return mask if self.rows is None else mask & self.rows[:, None, -mask.shape[-2] :, None]


class Record(Float):
    """Shows each named tensor and operand among `sites` (None: each named tensor) to `callback(site, value, where)`; of
    a spared token no element counts."""

    def __init__(
        self,
        callback: Callable[[str, np.ndarray, np.ndarray | None], None],
        sites: set[str] | None = None,
        **context: Any,
    ) -> None:
        super().__init__(**context)
        self.callback = callback
        self.sites = sites

    def operand(self, site: str, x: Var, where: np.ndarray | None = None) -> Var:
        if self.sites is not None and site in self.sites:
            self.callback(site, x.value, leave_out(where, self._spared(x)))
        return x

    def named(self, site: str, y: Var, where: np.ndarray | None = None) -> Var:
        if self.sites is None or site in self.sites:
            self.callback(site, y.value, leave_out(where, self._spared(y)))
        return y


class Quantizers(Float):
    """The three hooks as one: `apply(site, x, where)` for every site that has a quantizer, which neither sees nor
    changes the rows of spared tokens."""

    def __init__(self, specs: Mapping[str, Quant], *, masked_scores: bool = False, **context: Any) -> None:
        super().__init__(**context)
        self.specs = specs
        self.masked_scores = masked_scores

    @abstractmethod
    def apply(self, site: str, x: Var, where: np.ndarray | None) -> Var:
        """What the site's quantizer makes of x, of whose elements those count where `where` is true (None: all)."""

    def operand(self, site: str, x: Var, where: np.ndarray | None = None) -> Var:
        return self._apply_beside(site, x, where) if site in self.specs else x

    def weight(self, site: str, w: Var) -> Var:
        return self.apply(site, w, None) if site in self.specs else w

    def named(self, site: str, y: Var, where: np.ndarray | None = None) -> Var:
        if site not in self.specs:
            return y
        return self._apply_beside(site, y, None if self.masked_scores and site.endswith(".scores") else where)

    def _apply_beside(self, site: str, x: Var, where: np.ndarray | None) -> Var:
        """`apply` to the rows of all tokens but the spared ones."""
        spared = self._spared(x)
        y = self.apply(site, x, leave_out(where, spared))
        return y if spared is None else ops.select(spared, x, y)


class Calibrate(Quantizers):
    """Feeds one observer per static site; `quantize` passes on what the range so far makes of the tensor."""

    def __init__(
        self, specs: Mapping[str, Quant], *, quantize: bool = False, masked_scores: bool = False, **context: Any
    ) -> None:
        super().__init__(specs, masked_scores=masked_scores, **context)
        self.quantize = quantize
        self.observers: dict[str, Observer] = {}
        self.weights: dict[str, tuple[np.ndarray, np.ndarray] | None] = {}  # scales of those seen

    def apply(self, site: str, x: Var, where: np.ndarray | None) -> Var:
        spec = self.specs[site]
        if spec.dynamic:
            return dynamic_quantize(x, spec, where, is_weight(site)) if self.quantize else x
        observer = self.observers.setdefault(site, Observer(spec, is_weight(site)))
        if site not in self.weights:
            try:
                observer.update(x.value, where)
                scale = observer.scale_zero() if self.quantize else None
            except ValueError as error:
                raise ValueError(f"site {site}: {error}") from None
            if is_weight(site):  # the same in every batch
                self.weights[site] = scale
        else:
            scale = self.weights[site]
        return x if scale is None else fake_quantize(x, *scale, spec)

    def ranges(self) -> dict[str, Range]:
        """The ranges of the batches so far. Raises ValueError naming a static site that no batch has reached."""
        static = {}
        for site, spec in self.specs.items():
            if spec.dynamic:
                continue
            if site not in self.observers:
                raise ValueError(f"site {site} was not reached in calibration; is it a site of this model?")
            low, high = self.observers[site].range()
            static[site] = Range(low, high, *self.observers[site].scale_zero())
        return static


class FakeQuant(Quantizers):
    """Quantize-dequantize at every site of `specs`: static sites by `ranges`, dynamic ones by the tensor itself.

    `learned` holds `<site>.scale` and `<site>.zero_point` of learned ranges as leaves of the tape; `profile` has the
    rules of an engine; `show` is given each site and what its quantizer made.
    """

    def __init__(
        self,
        specs: Mapping[str, Quant],
        ranges: Mapping[str, Range],
        learned: Mapping[str, Var] | None = None,
        *,
        masked_scores: bool = False,
        profile: Profile = QTX,
        show: Callable[[str, np.ndarray], None] | None = None,
        **context: Any,
    ) -> None:
        super().__init__(specs, masked_scores=masked_scores, **context)
        self.profile = profile
        self.show = show
        self.ranges = ranges
        self.learned = learned or {}

    def apply(self, site: str, x: Var, where: np.ndarray | None) -> Var:
        y = self.quantize(site, x, where)
        if self.show is not None:
            self.show(site, y.value)
        return y

    def quantize(self, site: str, x: Var, where: np.ndarray | None) -> Var:
        """x through the site's quantizer."""
        spec = self.specs[site]
        if spec.dynamic:
            return dynamic_quantize(x, spec, where, is_weight(site), self.profile)
        if isinstance(spec, QuantSpec) and spec.learned and f"{site}.scale" in self.learned:
            learned = self.learned[f"{site}.scale"], self.learned[f"{site}.zero_point"]
            return learned_quantize(x, *learned, spec, self.profile)
        return fake_quantize(x, self.ranges[site].scale, self.ranges[site].zero_point, spec, self.profile)


def transform_input(x: Var, how: InputTransform) -> Var:
    """(x / divisor) R of x (..., I), in its dtype: SmoothQuant (Xiao et al. 2023, eq. 3) and Hadamard rotations
    (Ashkboos et al. 2024), whichever the transform has."""
    if how.divisor is not None:
        x = ops.divide(x, how.divisor)
    return ops.hadamard(x, how.block) if how.block else x


def leave_out(where: np.ndarray | None, spared: np.ndarray | None) -> np.ndarray | None:
    """The elements that count, boolean (None: all), without those of `spared`, boolean (None: none), in the shape of
    both broadcast."""
    if spared is None:
        return where
    return ~spared if where is None else where & ~spared


def is_weight(site: str) -> bool:
    """Whether a site is a weight as it is used, which has ranges along its first axis."""
    return site.endswith(".weight")
