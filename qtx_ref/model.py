"""A model with its parameters, as both backends have it: in float or under fake quantization, and one in integers.

Batches and results are NumPy arrays; see `qtx.data` for a batch's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import models, stats
from .attention import boolean_mask
from .integer.lifting import real
from .integer.model import Code, Integer
from .models import opt
from .models.initial import shapes
from .numerics import Calibrate, FakeQuant, Float, Record
from .quant import quantizer
from .quant.straight_through import learned_scale_zero
from .spec import (
    QTX,
    READ,
    Gate,
    Gradients,
    InputTransform,
    ModelSpec,
    Output,
    Profile,
    Quant,
    QuantSpec,
    Range,
    SpecError,
    check_batch,
    check_generation,
    check_integer,
    check_marks,
    check_tokens,
    divide_rows,
    read_processes,
)
from .tape import Var, backward, const, leaf

__all__ = [
    "Arrays",
    "Batch",
    "DTYPES",
    "IntegerModel",
    "Model",
    "check_bound",
    "check_device",
    "check_machine",
    "to_arrays",
]

Batch = Mapping[str, np.ndarray]
Arrays = dict[str, np.ndarray]
DTYPES = ("float32", "float64")
quiet = np.errstate(over="ignore", invalid="ignore")  # what overflows is seen in the result, and said there


class Model:
    """A model with its parameters, in float or, after `bind`, under fake quantization."""

    def __init__(
        self, spec: ModelSpec, params: Mapping[str, np.ndarray], *, device: str = "cpu", dtype: str = "float32"
    ):
        """params: every array of `shapes(spec)`.

        Raises:
            SpecError: a device other than cpu, or a dtype that the reference does not compute in.
        """
        check_machine(device, dtype)
        self.spec = spec
        self.weights = {name: np.array(params[name], dtype) for name in shapes(spec)}
        self.quants: dict[str, Quant] = {}
        self.fixed: dict[str, Range] = {}
        self.learned: Arrays = {}
        self.masked_scores = False
        self.transforms: dict[str, InputTransform] = {}
        self.gradient_quants: Gradients | None = None
        self.profile = QTX

    def params(self) -> Arrays:
        """Parameters by name, copied."""
        return {name: value.copy() for name, value in self.weights.items()}

    def trainable(self) -> Arrays:
        """What an optimizer updates, in place: parameters, and scale and zero point of learned ranges."""
        return self.weights | self.learned

    def bind(
        self,
        quants: Mapping[str, Quant],
        ranges: Mapping[str, Range],
        *,
        masked_scores: bool = False,
        transforms: Mapping[str, InputTransform] | None = None,
        gradients: Gradients | None = None,
        profile: Profile = QTX,
    ) -> None:
        """From now on quantize-dequantize the sites of `quants`; none: plain float. `transforms` by linear site, whose
        weights are made for them: float passes (`record`, `statistics`, ...) have them too. `gradients`: what backward
        passes quantize. `profile`: the rules of fake quantization (of quantizing and
        dequantizing, where it has none of its own) and of dynamic scales.

        Raises SpecError for a static site without a range, and for a scale or zero point that no quantizer has.
        """
        profile = profile.simulated()
        for site, spec in quants.items():
            if not spec.dynamic and site not in ranges:
                raise SpecError(f"site {site} has a static quantizer but no range: calibrate first")
            if not spec.dynamic:
                check_bound(site, ranges[site], spec, profile)
        self.quants, self.fixed, self.masked_scores = dict(quants), dict(ranges), masked_scores
        self.transforms, self.gradient_quants, self.profile = dict(transforms or {}), gradients, profile
        self.learned = {}
        for site, spec in quants.items():
            if spec.learned:
                self.learned[f"{site}.scale"] = np.array(ranges[site].scale, np.float32)
                self.learned[f"{site}.zero_point"] = np.array(ranges[site].zero_point, np.float32)

    def ranges(self) -> dict[str, Range]:
        """The static ranges in force, learned ones as they now stand."""
        static = dict(self.fixed)
        for site, spec in self.quants.items():
            if isinstance(spec, QuantSpec) and spec.learned:
                scale, zero = learned_scale_zero(
                    self.learned[f"{site}.scale"], self.learned[f"{site}.zero_point"], spec
                )
                static[site] = Range(scale * (spec.code_min - zero), scale * (spec.code_max - zero), scale, zero)
        return static

    def forward(self, batch: Batch) -> np.ndarray:
        """Logits, or hidden states of a model without head."""
        return self.compute(self._numerics(), self.accept(batch)).value

    @quiet
    def evaluate(self, batch: Batch) -> tuple[float, int, int]:
        """Summed negative log-likelihood in nats (float64), number of targets, number predicted right."""
        inputs = self.accept(batch)
        logits = self.compute(self._numerics(), inputs)
        targets, count = models.asked(inputs), models.count_targets(inputs)
        right = int(((logits.value.argmax(axis=-1) == targets) & (targets >= 0)).sum())
        return float(models.loss(logits, inputs).value) * count, count, right

    @quiet
    def gradients(
        self,
        batch: Batch,
        *,
        training: bool = False,
        seed: int = 0,
        step: int = 0,
        only: Collection[str] | None = None,
        accumulate: int = 1,
    ) -> tuple[float, Arrays]:
        """The loss and its gradient by every trainable array, or by those that `only` names.

        accumulate: parts of adjoining rows, one after another, each with its share of the loss. Gradients are summed in
        their own dtype. Raises SpecError where it does not divide the batch.
        """
        known, inputs = self.trainable(), self.accept(batch)
        given = {name: leaf(x) if only is None or name in only else const(x) for name, x in known.items()}
        leaves = {name: x for name, x in given.items() if x.wanted}
        grads: Arrays = {}
        count, total = models.count_targets(inputs), 0.0
        for rows in divide_rows(len(models.asked(inputs)), accumulate):
            part = {name: x[rows] for name, x in inputs.items()}
            at = {"seed": seed, "step": step, "first_row": rows.start}
            nx = self._numerics(given, training=training, gradients=self.gradient_quants, **at)
            nx.load(given)
            loss = models.loss(models.forward(nx, self.spec, part), part, count)
            total += float(loss.value)
            for name, grad in zip(leaves, backward(loss, leaves.values()), strict=True):
                grads[name] = grads[name] + grad if name in grads else grad
        return total, grads

    def record(
        self, batch: Batch, sites: Iterable[str] | None = None
    ) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        """Each named tensor of a float forward pass with the mask of elements that count (None: all)."""
        tensors: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        self._show(batch, sites, lambda site, x, where: tensors.__setitem__(site, (x, where)))
        return tensors

    def simulate(self, batch: Batch) -> Arrays:
        """What the quantizer of each site makes of its tensor in a forward pass as `bind` says, in the tensor's
        dtype and shape."""
        made: Arrays = {}
        if self.quants:
            self.compute(self._numerics(show=made.__setitem__), self.accept(batch))
        return made

    def statistics(
        self, batch: Batch, units: Mapping[str, str], names: tuple[str, ...] = stats.STATISTICS
    ) -> dict[str, Arrays]:
        """`stats.describe` of each site of `units` (site -> "sequence" or "token") in a float forward pass."""
        results: dict[str, Arrays] = {}

        def show(site: str, x: np.ndarray, where: np.ndarray | None) -> None:
            results[site] = stats.describe(x, where, units[site], names)

        self._show(batch, units, show)
        return results

    def input_moments(
        self, batch: Batch, sites: Iterable[str], names: tuple[str, ...] = stats.MOMENTS
    ) -> dict[str, Arrays]:
        """`stats.moments` of the input of each linear of `sites`, (..., I), over real tokens in a float forward
        pass."""
        results: dict[str, Arrays] = {}
        memo = stats.Memo(lambda x, where: stats.moments(x, where, names))

        def show(site: str, x: np.ndarray, where: np.ndarray | None) -> None:
            results[site.removesuffix(".input")] = memo.get(x, where)

        self._show(batch, [f"{site}.input" for site in sites], show)
        return results

    def attention(self, batch: Batch, marks: Mapping[str, np.ndarray], streams: Sequence[str]) -> list[Arrays]:
        """Of each layer, by head (H,): `stats.attention` of the keys of each mark (B, T), `stats.updates`,
        `stats.sizes` of values (`value.*`) and of their product with the probabilities, before a gate (`product.*`),
        and `stats.openings` where there is a gate.

        streams: for each layer the site that its attention's output is added to.
        """
        check_marks(self.spec, batch, marks)
        sums: list[Arrays] = [{} for _ in streams]
        residuals: Arrays = {}
        heads = self.spec.heads

        def show(site: str, x: np.ndarray, where: np.ndarray | None) -> None:
            if site in streams:
                residuals[site] = x
                return
            block, _, part = site.partition(".attn.")
            layer = int(block.removeprefix("layer."))
            if part == "probs":
                assert where is not None  # the mask
                sums[layer] |= stats.attention(x, where, marks)
            elif part == "gate":
                sums[layer] |= stats.openings(x, where, heads)
            elif part == "output.input":
                weight = self.weights[f"{block}.attn.output.weight"]
                sums[layer] |= stats.updates(x, weight, residuals.pop(streams[layer]), where, heads)
            else:
                name = "value" if part == "value" else "product"
                sums[layer] |= {f"{name}.{key}": value for key, value in stats.sizes(x, where, marks, heads).items()}

        parts = ("probs", "value", "context", "output.input", *(["gate"] * (self.spec.attention.gate is not Gate.NONE)))
        sites = {f"layer.{i}.attn.{part}" for i in range(self.spec.layers) for part in parts}
        self._show(batch, sites | set(streams), show)
        return sums

    def calibrate(
        self,
        batches: Iterable[Batch],
        quants: Mapping[str, Quant],
        *,
        quantize: bool = False,
        masked_scores: bool = False,
        transforms: Mapping[str, InputTransform] | None = None,
    ) -> dict[str, Range]:
        """Static ranges of `quants` from batches, under these transforms (not those of `bind`). Raises ValueError
        naming a site without finite values."""
        nx = Calibrate(quants, quantize=quantize, masked_scores=masked_scores, transforms=transforms)
        for batch in batches:
            self.compute(nx, self.accept(batch))
        return nx.ranges()

    def generate(self, tokens: np.ndarray, count: int, choose: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """`count` further tokens after tokens (B, T), each chosen from logits (B, V) -> (B,); keys and values are
        cached.

        Raises:
            SpecError: the model is not causal, the text would outgrow it, a quantizer would see the future, or tokens,
                given or chosen, are none of the model's.
        """
        check_generation(self.spec, self.quants, tokens.shape[1] + count)
        check_tokens(self.spec, tokens)
        cache: list = []
        fresh, nx = tokens, self._numerics()
        for _ in range(count):
            logits = self.compute(nx, to_arrays({"tokens": fresh}, np.dtype(np.float32)), cache)
            fresh = np.asarray(choose(logits.value[:, -1]))[:, None]
            check_tokens(self.spec, fresh)
            tokens = np.concatenate([tokens, fresh], axis=1)
        return tokens

    def accept(self, batch: Batch) -> Batch:
        """The batch as `compute` takes it: whole numbers int64, the mask boolean, images in the parameters' dtype.

        Raises SpecError where it is not one of this model's (`spec.check_batch`), ValueError for a mask that is neither
        boolean nor additive.
        """
        check_batch(self.spec, batch)
        return to_arrays(batch, next(iter(self.weights.values())).dtype)

    @quiet
    def compute(self, nx: Float, inputs: Batch, cache: list | None = None) -> Var:
        """A forward pass of what `accept` gave under a numerics; cache as `models.opt` takes it."""
        nx.load(self.weights)
        if cache is None:
            return models.forward(nx, self.spec, inputs)
        return opt.forward(nx, self.spec, inputs, cache)

    def _numerics(self, leaves: Mapping[str, Var] | None = None, **context: Any) -> Float:
        context["transforms"] = self.transforms
        if not self.quants:
            return Float(**context)
        learned = leaves or {name: const(value) for name, value in self.learned.items()}
        context |= {"masked_scores": self.masked_scores, "profile": self.profile}
        return FakeQuant(self.quants, self.fixed, learned, **context)

    def _show(
        self,
        batch: Batch,
        sites: Iterable[str] | None,
        show: Callable[[str, np.ndarray, np.ndarray | None], None],
    ) -> None:
        """A float forward pass that shows the results, or operands, of `sites`."""
        nx = Record(show, None if sites is None else set(sites), transforms=self.transforms)
        self.compute(nx, self.accept(batch))


class IntegerModel:
    """A lowered model: codes in, codes or accumulators out."""

    def __init__(
        self,
        spec: ModelSpec,
        constants: Mapping[str, np.ndarray],
        quants: Mapping[str, QuantSpec],
        profile: Profile,
        *,
        device: str = "cpu",
        strict: bool = False,
    ):
        """constants: what `lowering.lower` made. strict: no float anywhere, at the price of slow matmuls.

        Raises:
            SpecError: a device other than cpu; under strict, a profile or a quantizer that needs a float.
        """
        check_device(device)
        check_integer(quants, profile, strict=strict)
        self.spec = spec
        self.quants = dict(quants)
        self.constants = dict(constants)
        self.profile = profile
        self.strict = strict

    def run(self, batch: Batch, record: Callable[[str, np.ndarray], None] | None = None) -> Output:
        """The model's output. `record(name, value)` is shown every site's codes, and `<site>.accumulator`s."""
        return self.read_output(self.compute(self.make_numerics(record), self.accept(batch)))

    def generate(self, tokens: np.ndarray, count: int, choose: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """`count` further tokens after tokens (B, T), each chosen from logits (B, V), float64 -> (B,). Keys and values
        are cached as codes. Raises SpecError as `Model.generate`."""
        check_generation(self.spec, self.quants, tokens.shape[1] + count)
        check_tokens(self.spec, tokens)
        cache: list = []
        fresh, nx = tokens, self.make_numerics()
        for _ in range(count):
            inputs = to_arrays({"tokens": fresh}, np.dtype(np.float32))
            logits = real(self.read_output(self.compute(nx, inputs, cache)))
            fresh = np.asarray(choose(logits[:, -1]))[:, None]
            check_tokens(self.spec, fresh)
            tokens = np.concatenate([tokens, fresh], axis=1)
        return tokens

    def accept(self, batch: Batch) -> Batch:
        """The batch as `compute` takes it: whole numbers int64, the mask boolean, images float32. Raises as
        `Model`'s."""
        check_batch(self.spec, batch, integer=True)
        return to_arrays(batch, np.dtype(np.float32))

    def make_numerics(self, record: Callable[[str, np.ndarray], None] | None = None) -> Integer:
        """The arithmetic of one or more forward passes; `record` as in `run`."""
        show = None if record is None else lambda name, value: record(name, np.asarray(value))
        return Integer(self.constants, self.quants, self.profile, strict=self.strict, record=show)

    def compute(self, nx: Integer, inputs: Batch, cache: list | None = None) -> Code:
        """A forward pass of what `accept` gave; cache as `models.opt` takes it."""
        if cache is None:
            return models.forward(nx, self.spec, inputs)
        return opt.forward(nx, self.spec, inputs, cache)

    def read_output(self, out: Code) -> Output:
        """What `compute` gave as arrays, with the scale that it has."""
        scale = out.unit if out.measured else self.constants["output.scale"]
        return Output(np.asarray(out.value), np.asarray(scale, np.float64), np.asarray(out.zero_point))


def to_arrays(batch: Batch, dtype: np.dtype) -> Arrays:
    """What a model reads of a batch, in the shapes of `spec.check_batch`: whole numbers int64, masks boolean, images
    in `dtype`. Raises ValueError for a mask that is neither boolean nor additive."""
    arrays = {name: np.asarray(batch[name]) for name in READ if name in batch}
    for name, value in arrays.items():
        if name == "mask":
            arrays[name] = boolean_mask(value)
        elif name != "spared":
            arrays[name] = value.astype(dtype if name in ("images", "soft_labels") else np.int64)
    return arrays


def check_bound(site: str, range: Range, spec: Quant, profile: Profile) -> None:
    """Raises SpecError naming a site whose static scale or zero point no quantizer has."""
    try:
        quantizer.check_quantizer(np.shape(range.scale), range.scale, range.zero_point, spec, profile)
    except ValueError as error:
        raise SpecError(f"site {site}: {error}") from None


def check_device(name: str) -> None:
    """Raises SpecError for a device other than cpu."""
    if name != "cpu":
        raise SpecError(f"device is {name!r}: the reference runs on cpu; use --backend torch for others")


def check_machine(device: str, dtype: str) -> None:
    """Raises SpecError for a device other than cpu, for a dtype that the reference does not compute in, and where it is
    one of several processes."""
    check_device(device)
    if (count := read_processes()[1]) > 1:
        raise SpecError(f"torchrun started {count} processes: the reference trains in one; use --backend torch")
    if dtype not in DTYPES:
        raise SpecError(f"dtype is {dtype!r}: the reference computes in {' or '.join(DTYPES)}")
