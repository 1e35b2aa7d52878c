"""What a cost is measured on, and the engines that are run beside us: export to ONNX, and torch's own dynamic int8.

Not in the reference: the engines that are run beside us take torch's tensors and modules.

A runner takes a batch to the device once (`inputs`), is called with it, and leaves its result where it is; `output` fetches
it. So latency is that of the pass alone.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qtx_ref.spec import Family, ModelSpec, Output

from .. import models
from ..arrays import Batch, to_numpy
from ..attention import Mask
from ..backend import IntegerModel, Model
from ..numerics import Float, Record
from ..sites import SiteModule, attach, linears

PRODUCTS = ("mm", "matmul", "linear", "attention", "gemm", "einsum")  # in the names of ops that multiply matrices
TOP = 6  # ops that a profile names
EXAMPLE = (2, 8)  # sequences and tokens that the exporter traces; both axes stay free


# --- runners ----------------------------------------------------------------------------------------------------------


class FloatRunner:
    """A float or fake-quantized model under `nx`."""

    def __init__(self, model: Model, nx: Float | None = None) -> None:
        self.model = model
        self.nx = nx or Float()
        self.device = model.device

    def inputs(self, batch: Batch) -> dict[str, Tensor | None]:
        return self.model.accept(batch)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor | None]) -> Tensor:
        return self.model.compute(self.nx, inputs)

    def output(self, result: Tensor) -> np.ndarray:
        return to_numpy(result)


class IntegerRunner:
    """A model in integers."""

    def __init__(self, model: IntegerModel) -> None:
        self.model = model
        self.device = model.device

    def inputs(self, batch: Batch) -> dict[str, Tensor | None]:
        return self.model.accept(batch)

    def __call__(self, inputs: Mapping[str, Tensor | None]):
        return self.model.compute(self.model.make_numerics(), inputs)

    def output(self, result) -> Output:
        return self.model.read_output(result)


def bfloat16_runner(model: Model) -> FloatRunner:
    """The model with its parameters, and so all its arithmetic, in bfloat16: not autocast, which rounds float32
    parameters anew in every pass."""
    model.net.to(torch.bfloat16)
    return FloatRunner(model)


def unfused(model: Model) -> Model:
    """The model with probabilities that somebody looks at, so that no fused kernel stands in for its attention."""
    sites = [f"layer.{i}.attn.probs" for i in range(model.spec.layers)]
    attach(model.net, {site: Record(site, lambda *shown: None) for site in sites})
    return model


class DynamicInt8(Float):
    """torch's dynamic int8: weights in int8 with one scale each, activations measured as they come, float32 results.

    As `torch.ao.quantization.quantize_dynamic` sets up `nn.Linear`: weights by absmax / 127.5, activations in 7 bits, which
    its u8 x s8 kernels need where pairs saturate in int16. Linears of one matrix only: a gate per head stays in float.
    The float weights that it replaces are let go.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.packed: dict[str, object] = {}
        modules = linears(model.net)
        tied = {module.tied for module in modules.values()}
        weights = dict(model.weights)
        for site, module in modules.items():
            name = module.tied or f"{site}.weight"
            if weights[name].ndim != 2:
                continue
            self.packed[site] = pack(weights[name].detach(), module.bias)
            if name not in tied:
                module.weight = nn.Parameter(torch.empty(0))
                del model.weights[name]

    def linear(self, module: SiteModule, x: Tensor, *, weight: Tensor | None = None, named: bool = True) -> Tensor:
        if module.site not in self.packed:
            return super().linear(module, x, weight=weight, named=named)
        y = torch.ops.quantized.linear_dynamic(x, self.packed[module.site], True)
        return self._named(module, y) if named else y


def pack(weight: Tensor, bias: Tensor | None) -> object:
    """An int8 weight as torch's kernels keep it."""
    scale = max(weight.abs().max().item() / 127.5, torch.finfo(torch.float32).eps)
    with warnings.catch_warnings():  # torch 2.13 announces the end of these tensors
        warnings.simplefilter("ignore")
        code = torch.quantize_per_tensor(weight.float(), scale, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(code, None if bias is None else bias.detach().float())


# --- clocks and counters ----------------------------------------------------------------------------------------------


def timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Seconds that a call takes: by the clock, on CUDA by its events."""

    def by_clock(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def by_events(call: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return by_events if device.type == "cuda" else by_clock


def cuda_peak(device: torch.device, call: Callable[[], object]) -> int:
    """Most bytes that tensors held while a call ran, the model's own among them."""
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def shares(device: torch.device, call: Callable[[], object]) -> tuple[dict[str, float], float]:
    """Share of a call's op time: of each of the most expensive ops, and of all matrix products."""
    cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as found:
        call()
        if cuda:
            torch.cuda.synchronize(device)
    spent = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in found.key_averages()
        if event.key.startswith(("aten::", "quantized::", "onednn::", "mkldnn"))
    }
    total = sum(spent.values()) or 1
    largest = sorted(spent, key=spent.__getitem__, reverse=True)[:TOP]
    matrices = sum(t for name, t in spent.items() if any(part in name for part in PRODUCTS))
    return {name.removeprefix("aten::"): spent[name] / total for name in largest}, matrices / total


# --- export -----------------------------------------------------------------------------------------------------------


class TracedMask(Mask):
    """A mask that looks at no value: queries without keys are closed whether or not there are any."""

    @cached_property
    def empty(self) -> Tensor | None:
        return None if self.full or self.triangle else ~self.allowed.any(dim=-1, keepdim=True)


class Traced(Float):
    """`Float` without a branch on the data."""

    def attention(self, attn, q, k, v, mask, spec, rate) -> Tensor:
        traced = TracedMask(mask.allowed, mask.dtype, full=mask.full, triangle=mask.triangle)
        return super().attention(attn, q, k, v, traced, spec, rate)


class Exportable(nn.Module):
    """A model as a function of its inputs in order. Its parameters are a list: `embed.type` is no attribute of a module
    that the exporter may make, `nn.Module` having a method of that name."""

    def __init__(self, net: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.parts = nn.ParameterList(net.parameters())
        self.keys = [name for name, _ in net.named_parameters()]
        self.net = (net,)  # in a tuple: no child

    def forward(self, *inputs: Tensor) -> Tensor:
        batch = {"mask": None} | dict(zip(self.names, inputs, strict=True))
        return torch.func.functional_call(self.net[0], dict(zip(self.keys, self.parts, strict=True)), (Traced(), batch))


def input_names(spec: ModelSpec, masked: bool) -> list[str]:
    """What an exported model takes, in order."""
    if spec.family is Family.VIT:
        return ["images"]
    return ["tokens"] + ["mask"] * masked + ["types"] * (spec.family is Family.BERT)


def export_onnx(spec: ModelSpec, params: Mapping[str, np.ndarray], path: Path, *, masked: bool) -> None:
    """The float model as an ONNX file, by torch's exporter; batch and length are free.

    masked: whether it takes a mask (B, T), boolean; without one every token is real, and no kernel pays for a mask.
    """
    names = input_names(spec, masked)
    net = models.build(spec)
    with torch.no_grad():
        for name, value in net.named_parameters():
            value.copy_(torch.tensor(params[name]))
    size, length = EXAMPLE[0], min(EXAMPLE[1], spec.length)
    tokens = torch.arange(size * length).reshape(size, length)
    example = {
        "tokens": tokens % max(spec.vocab, 1),
        "mask": tokens % length < length - 1,
        "types": torch.zeros_like(tokens),
        "images": torch.zeros(size, spec.channels, spec.image_size, spec.image_size),
    }
    free = torch.export.Dim.DYNAMIC
    axes = tuple({0: free} if name == "images" else {0: free, 1: free} for name in names)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names every package that it would also know
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter and its packages, about themselves
        torch.onnx.export(
            Exportable(net, names).eval(), tuple(example[name] for name in names), path, dynamo=True,
            dynamic_shapes=(axes,), input_names=names, output_names=["output"], external_data=False, verbose=False,
        )  # fmt: skip
