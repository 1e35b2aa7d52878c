"""A model with its parameters, as both backends have it: in float or under fake quantization, and one in integers.

Differs from the reference: check_device, to_arrays: `arrays` finds the device and takes a batch there.
Differs from the reference: Model.leaves, Model.backward: the optimizer works on tensors, and the results are arrays.
Differs from the reference: IntegerModel: it can be compiled.
Differs from the reference: Model.loss, Model.spread: a step may be compiled, and processes may share a model.

Batches and results are NumPy arrays; see `qtx.data` for a batch's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from qtx_ref.spec import (
    QTX,
    Gate,
    Gradients,
    InputTransform,
    ModelSpec,
    Output,
    Profile,
    Quant,
    QuantSpec,
    Range,
    Sharding,
    SpecError,
    check_batch,
    check_generation,
    check_integer,
    check_marks,
    check_tokens,
    divide_rows,
)

from . import distributed, models, stats
from .arrays import find_device, to_numpy, to_tensors
from .compiler import tell_failure
from .integer.execution import Execution, make_execution
from .integer.model import Code, Integer, Whole
from .integer.proof import EAGER
from .numerics import (
    Calibrate,
    FakeQuant,
    Float,
    Record,
    Transformed,
)
from .quant import quantizer
from .quant.straight_through import learned_scale_zero
from .sites import attach, slots, swap_hooks, swap_transforms, transform

Batch = Mapping[str, np.ndarray]
Arrays = dict[str, np.ndarray]
DTYPES = ("float32", "float64", "bfloat16", "float16")
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # matmuls alone are in them


class Model:
    """A model with its parameters, in float or, after `bind`, under fake quantization."""

    def __init__(
        self, spec: ModelSpec, params: Mapping[str, np.ndarray], *, device: str = "cpu", dtype: str = "float32"
    ):
        """params: every parameter of the model. bfloat16, float16: parameters and quantizers float32, matmuls under
        autocast.

        Raises:
            SpecError: a device that is not there, or a dtype that is not one of DTYPES.
        """
        check_machine(device, dtype)
        self.spec = spec
        self.device = find_device(device)
        self.dtype = dtype
        self.net = models.build(spec).to(self.device, torch.float64 if dtype == "float64" else torch.float32)
        self.weights = dict(self.net.named_parameters())
        self.forward_pass: Callable[..., Tensor] = self.compute  # of what is differentiated
        self.run: Callable[..., Tensor] = self.loss  # what is differentiated
        self.sharded = False  # whether each process has its share of `weights`
        with torch.no_grad():
            for name, value in self.weights.items():
                value.copy_(torch.tensor(params[name]))
        self.quants: dict[str, Quant] = {}
        self.fixed: dict[str, Range] = {}
        self.learned: dict[str, nn.Parameter] = {}
        self.gradient_quants: Gradients | None = None

    def params(self) -> Arrays:
        """Parameters by name, copied."""
        return {name: to_numpy(distributed.gather(value)) for name, value in self.weights.items()}

    def trainable(self) -> Arrays:
        """What an optimizer updates: parameters, and scale and zero point of learned ranges; copied."""
        return {name: to_numpy(distributed.gather(value)) for name, value in self.leaves().items()}

    def leaves(self) -> dict[str, nn.Parameter]:
        """`trainable` as the tensors themselves."""
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

        Raises SpecError for a static site without a range, for a scale or zero point that no quantizer has, and for a
        site that the model does not have.
        """
        profile = profile.simulated()
        hooks = {}
        for site, spec in quants.items():
            if not spec.dynamic and site not in ranges:
                raise SpecError(f"site {site} has a static quantizer but no range: calibrate first")
            tensors = None if spec.dynamic else Range(*(torch.tensor(np.asarray(part)) for part in ranges[site]))
            if tensors is not None:
                check_bound(site, tensors, spec, profile)
            hooks[site] = FakeQuant(site, spec, tensors, masked_scores=masked_scores, profile=profile).to(self.device)
        attach(self.net, hooks)
        transform(self.net, self._transforms(transforms))
        self.quants, self.fixed, self.gradient_quants = dict(quants), dict(ranges), gradients
        self.learned = {
            f"{site}.{name}": value for site, hook in hooks.items() for name, value in hook.named_parameters()
        }

    def ranges(self) -> dict[str, Range]:
        """The static ranges in force, learned ones as they now stand."""
        static = dict(self.fixed)
        for site, spec in self.quants.items():
            if spec.learned:
                held = (self.learned[f"{site}.{name}"] for name in ("scale", "zero_point"))
                scale, zero = map(to_numpy, learned_scale_zero(*held, spec))
                static[site] = Range(scale * (spec.code_min - zero), scale * (spec.code_max - zero), scale, zero)
        return static

    @torch.no_grad()
    def forward(self, batch: Batch) -> np.ndarray:
        """Logits, or hidden states of a model without head."""
        return to_numpy(self.compute(Float(), self.accept(batch)))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int, int]:
        """Summed negative log-likelihood in nats (float64), number of targets, number predicted right."""
        inputs = self.accept(batch)
        logits = self.compute(Float(), inputs)
        targets, count = models.asked(inputs), models.count_targets(inputs)
        right = int(((logits.argmax(dim=-1) == targets) & (targets >= 0)).sum())
        return float(models.loss(logits, inputs)) * count, count, right

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
        make = partial(Float, training=training, seed=seed, step=step)
        loss, grads = self.backward(self.accept(batch), make, only, accumulate=accumulate)
        return loss.item(), {name: to_numpy(distributed.gather(grad)) for name, grad in grads.items()}

    def backward(
        self,
        inputs: Mapping[str, Tensor | None],
        make: Callable[..., Float],
        only: Collection[str] | None = None,
        *,
        accumulate: int = 1,
        first: int = 0,
        count: int | None = None,
        scale: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`gradients` of what `accept` gave, as tensors; zeros where the loss does not depend on a parameter.

        make: the numerics of a part, called with its `first_row` and `gradients`. inputs: rows `first` on of a global
        batch that has `count` targets; None: all of it. The gradients are of `scale` times the loss.
        """
        leaves = self.leaves()
        for name, value in leaves.items():
            value.grad = None
            value.requires_grad_(only is None or name in only)
        count = models.count_targets(inputs) if count is None else count
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        parts = divide_rows(len(models.asked(inputs)), accumulate)
        for rows in parts:
            part = {name: None if x is None else x[rows] for name, x in inputs.items()}
            nx = make(first_row=first + rows.start, gradients=self.gradient_quants)
            with distributed.hold_back(self.run, last=rows is parts[-1]):
                loss = self.run(nx, part, count)
                loss.backward(torch.full_like(loss, scale))  # adds to each `grad`
            total += loss.detach()
        wanted = {name: value for name, value in leaves.items() if value.requires_grad}
        grads = {name: torch.zeros_like(v) if v.grad is None else v.grad for name, v in wanted.items()}
        for name in self.learned if self.sharded else ():  # DDP has summed all of them
            if name in grads:
                distributed.add(grads[name])
        return distributed.add(total), grads

    def record(
        self, batch: Batch, sites: Iterable[str] | None = None
    ) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        """Each named tensor of a float forward pass with the mask of elements that count (None: all)."""
        tensors: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}

        def show(site: str, x: Tensor, where: Tensor | None) -> None:
            tensors[site] = (to_numpy(x), None if where is None else to_numpy(where))

        self._show(batch, self._results() if sites is None else sites, show)
        return tensors

    @torch.no_grad()
    def simulate(self, batch: Batch) -> Arrays:
        """What the quantizer of each site makes of its tensor in a forward pass as `bind` says, in the tensor's
        dtype and shape."""
        made: Arrays = {}
        hooks = [
            module.register_forward_hook(lambda quantizer, _, y: made.__setitem__(quantizer.site, to_numpy(y)))
            for module in self.net.modules()
            if isinstance(module, FakeQuant)
        ]
        try:
            self.forward(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return made

    def statistics(
        self, batch: Batch, units: Mapping[str, str], names: tuple[str, ...] = stats.STATISTICS
    ) -> dict[str, Arrays]:
        """`stats.describe` of each site of `units` (site -> "sequence" or "token") in a float forward pass."""
        results: dict[str, Arrays] = {}

        def show(site: str, x: Tensor, where: Tensor | None) -> None:
            results[site] = {k: to_numpy(v) for k, v in stats.describe(x, where, units[site], names).items()}

        self._show(batch, units, show)
        return results

    def input_moments(
        self, batch: Batch, sites: Iterable[str], names: tuple[str, ...] = stats.MOMENTS
    ) -> dict[str, Arrays]:
        """`stats.moments` of the input of each linear of `sites`, (..., I), over real tokens in a float forward
        pass."""
        results: dict[str, Arrays] = {}
        memo = stats.Memo(lambda x, where: {k: to_numpy(v) for k, v in stats.moments(x, where, names).items()})

        def show(site: str, x: Tensor, where: Tensor | None) -> None:
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
        keys = {mark: torch.tensor(np.array(value), device=self.device) for mark, value in marks.items()}
        sums: list[Arrays] = [{} for _ in streams]
        residuals: dict[str, Tensor] = {}
        heads = self.spec.heads

        def show(site: str, x: Tensor, where: Tensor | None) -> None:
            if site in streams:
                residuals[site] = x
                return
            block, _, part = site.partition(".attn.")
            layer = int(block.removeprefix("layer."))
            if part == "probs":
                made = stats.attention(x, where, keys)
            elif part == "gate":
                made = stats.openings(x, where, heads)
            elif part == "output.input":
                weight = self.weights[f"{block}.attn.output.weight"].detach()
                made = stats.updates(x, weight, residuals.pop(streams[layer]), where, heads)
            else:
                name = "value" if part == "value" else "product"
                made = {f"{name}.{key}": value for key, value in stats.sizes(x, where, keys, heads).items()}
            sums[layer] |= {name: to_numpy(value) for name, value in made.items()}

        parts = ("probs", "value", "context", "output.input", *(["gate"] * (self.spec.attention.gate is not Gate.NONE)))
        sites = [f"layer.{i}.attn.{part}" for i in range(self.spec.layers) for part in parts]
        self._show(batch, [*streams, *sites], show)
        return sums

    @torch.no_grad()
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
        hooks = {k: Calibrate(k, q, quantize=quantize, masked_scores=masked_scores) for k, q in quants.items()}
        with swap_hooks(self.net, hooks), swap_transforms(self.net, self._transforms(transforms)):
            for batch in batches:
                self.compute(Float(), self.accept(batch))
        return {k: Range(*map(to_numpy, hooks[k].range())) for k, q in quants.items() if not q.dynamic}

    @torch.no_grad()
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
        fresh, nx = tokens, Float()
        for _ in range(count):
            logits = self.compute(nx, to_tensors({"tokens": fresh}, self.device), cache)
            fresh = np.asarray(choose(to_numpy(logits[:, -1])))[:, None]
            check_tokens(self.spec, fresh)
            tokens = np.concatenate([tokens, fresh], axis=1)
        return tokens

    def accept(self, batch: Batch) -> dict[str, Tensor | None]:
        """The batch as `compute` takes it: tensors on the device, whole numbers int64, the mask boolean, or None where
        every token is real.

        Raises SpecError where it is not one of this model's (`spec.check_batch`), ValueError for a mask that is neither
        boolean nor additive.
        """
        check_batch(self.spec, batch)
        return to_tensors(batch, self.device)

    def compute(self, nx: Float, inputs: Mapping[str, Tensor | None], cache: list | None = None) -> Tensor:
        """A forward pass of what `accept` gave under a numerics; cache as `models.opt` takes it."""
        half = HALVES.get(self.dtype)
        with torch.autocast(self.device.type, half, enabled=half is not None):
            return self.net(nx, inputs) if cache is None else self.net(nx, inputs, cache)

    def loss(self, nx: Float, inputs: Mapping[str, Tensor | None], count: int) -> Tensor:
        """The share in the loss that this part of a batch has which has `count` targets."""
        return models.loss(self.forward_pass(nx, inputs), inputs, count)

    def spread(self, sharding: Sharding) -> None:
        """From now on one model with those of the other processes: `backward` gives the sums of all gradients, and what
        `sharding` shares out, `weights` among it, each process has its share of."""
        if sharding is Sharding.NONE:
            self.run = distributed.copy_whole(self.net, self.loss)
            return
        lower = self.dtype == "bfloat16" and not self.quants  # quantizers see float32
        distributed.shard(self.net, self.device, set(self.learned.values()), bfloat16=lower)
        self.sharded = True
        fresh = dict(self.net.named_parameters())
        self.weights = {name: fresh[name] for name in self.weights}

    def _transforms(self, transforms: Mapping[str, InputTransform] | None) -> dict[str, nn.Module]:
        return {site: Transformed(how).to(self.device) for site, how in (transforms or {}).items()}

    def _results(self) -> list[str]:
        """The sites' own keys, without operands and weights."""
        return [key for key, (_, slot) in slots(self.net).items() if slot == "on_output"]

    @torch.no_grad()
    def _show(self, batch: Batch, sites: Iterable[str], show: Callable[[str, Tensor, Tensor | None], None]) -> None:
        """A float forward pass that shows the results, or operands, of `sites`."""
        with swap_hooks(self.net, {site: Record(site, show) for site in sites}):
            self.compute(Float(), self.accept(batch))


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
        compiled: bool = False,
    ):
        """constants: what the reference's `lowering.lower` made. strict: no float anywhere, at the price of slow
        matmuls. compiled: whole passes that nobody watches by `integer.execution`, the same codes; where nothing can be
        compiled a warning says why, and they are eager. Text is generated eagerly: each token makes it longer.

        Raises:
            SpecError: a device that is not there; under strict, one that is not the cpu, and a profile or a quantizer
                that needs a float; compiled: together with strict, and what cannot be proved of all data.
        """
        self.device = find_device(device)
        if strict and self.device.type != "cpu":
            raise SpecError(f"device is {device!r}, which multiplies no integers: strict runs on cpu")
        check_integer(quants, profile, strict=strict)
        self.spec = spec
        self.quants = dict(quants)
        self.constants = {name: torch.tensor(np.asarray(c), device=self.device) for name, c in constants.items()}
        self.profile = profile
        self.strict = strict
        with torch.device("meta"):  # wiring; the numbers are the constants
            self.net = models.build(spec)
        self.execution: Execution | None = None
        if compiled:
            if strict:
                raise SpecError("compiled is True, and strict: a compiled graph has floats; leave one of them out")
            self.execution = make_execution(self.net, spec, self.constants, self.quants, profile, self.device)

    def run(self, batch: Batch, record: Callable[[str, np.ndarray], None] | None = None) -> Output:
        """The model's output. `record(name, value)` is shown every site's codes, and `<site>.accumulator`s. Raises
        SpecError where a compiler is there and fails."""
        return self.read_output(self.compute(self.make_numerics(record), self.accept(batch)))

    def generate(self, tokens: np.ndarray, count: int, choose: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """`count` further tokens after tokens (B, T), each chosen from logits (B, V), float64 -> (B,). Keys and values
        are cached as codes. Raises SpecError as `Model.generate`."""
        check_generation(self.spec, self.quants, tokens.shape[1] + count)
        check_tokens(self.spec, tokens)
        cache: list = []
        fresh, nx = tokens, self.make_numerics()
        for _ in range(count):
            out = self.read_output(self.compute(nx, to_tensors({"tokens": fresh}, self.device), cache))
            logits = out.scale * (out.value.astype(np.int64) - out.zero_point)
            fresh = np.asarray(choose(logits[:, -1]))[:, None]
            check_tokens(self.spec, fresh)
            tokens = np.concatenate([tokens, fresh], axis=1)
        return tokens

    def accept(self, batch: Batch) -> dict[str, Tensor | None]:
        """The batch as `compute` takes it, as `Model`'s, and raises as that does."""
        check_batch(self.spec, batch, integer=True)
        return to_tensors(batch, self.device)

    def make_numerics(self, record: Callable[[str, np.ndarray], None] | None = None) -> Integer:
        """The arithmetic of one or more forward passes; `record` as in `run`."""
        show = None if record is None else lambda name, value: record(name, to_numpy(value))
        return Integer(self.constants, self.quants, self.profile, strict=self.strict, record=show)

    @torch.no_grad()
    def compute(self, nx: Integer, inputs: Mapping[str, Tensor | None], cache: list | None = None) -> Code:
        """A forward pass of what `accept` gave; cache as `models.opt` takes it."""
        if self.execution is not None and cache is None and nx.record is None:
            with tell_failure(EAGER):
                out = self.execution(inputs)
            if out is not None:
                return out
        if self.strict:
            nx.whole = Whole(on="images" not in inputs)
        with nx.whole or nullcontext():
            return self.net(nx, inputs) if cache is None else self.net(nx, inputs, cache)

    def read_output(self, out: Code) -> Output:
        """What `compute` gave as arrays, with the scale that it has."""
        scale = to_numpy(out.unit) if out.measured else self.constants["output.scale"].cpu().numpy()
        return Output(to_numpy(out.value), np.asarray(scale, np.float64), to_numpy(out.zero_point))


def check_bound(site: str, range: Range, spec: Quant, profile: Profile) -> None:
    """Raises SpecError naming a site whose static scale or zero point no quantizer has."""
    try:
        quantizer.check_quantizer(range.scale.shape, range.scale, range.zero_point, spec, profile)
    except ValueError as error:
        raise SpecError(f"site {site}: {error}") from None


def check_machine(device: str, dtype: str) -> None:
    """Raises SpecError for a device that is not there, or a dtype that is not one of DTYPES."""
    find_device(device)
    if dtype not in DTYPES:
        raise SpecError(f"dtype is {dtype!r}: torch computes in {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
