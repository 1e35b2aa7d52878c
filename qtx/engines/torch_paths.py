"""torch's kernels for quantized tensors, for simulation and for casts; `torch_linear` has its products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .backend import need
from .paths import Path
from .torch_linear import LINEAR_PATHS, multiply, run_linear

PACKAGES = {"torch": "torch"}
NAME = "torch"
SIGNED, NARROW = ("int8", "uint8"), ("int8", "uint8", "int16", "uint16", "int4", "uint4")
PER_CHANNEL, DECOMPOSED = "torch-quantize_per_channel", "torch-decomposed"
FAKE = "torch-fake_quantize"
PATHS = (
    Path("torch-quantize_per_tensor", NAME, "quantize", "torch-quantize_per_tensor", SIGNED),
    Path("torch-quantize_per_tensor", NAME, "dequantize", "torch-quantize_per_tensor", SIGNED),
    Path(PER_CHANNEL, NAME, "quantize", PER_CHANNEL, SIGNED),
    Path(PER_CHANNEL, NAME, "dequantize", PER_CHANNEL, SIGNED),
    Path(DECOMPOSED, NAME, "quantize", DECOMPOSED, NARROW),
    Path(DECOMPOSED, NAME, "dequantize", DECOMPOSED, NARROW),
    Path(FAKE, NAME, "fake_quantize", FAKE, NARROW),
    Path("torch-fake_quantize-tensor", NAME, "fake_quantize", FAKE, NARROW),
    Path("torch-fake_quantize-channel", NAME, "fake_quantize", f"{FAKE}-channel", NARROW),
    Path("torch-fake_quantize-learnable", NAME, "fake_quantize", FAKE, NARROW),
    Path("torch-fake_quantize-learnable_channel", NAME, "fake_quantize", f"{FAKE}-channel", NARROW),
    Path("torch-observer", NAME, "scale", "torch-quantize_per_tensor", SIGNED),
    Path(DECOMPOSED, NAME, "scale", DECOMPOSED, SIGNED),
    Path("torch-cast", NAME, "cast", "torch-quantize_per_tensor", ("e4m3", "e5m2")),
    *LINEAR_PATHS,
)
BY_CHANNEL = (PER_CHANNEL, f"{FAKE}-channel", f"{FAKE}-learnable_channel")  # whose kernels ask for an axis
FORMATS = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
WIDER = {"int4": "int8", "uint4": "uint8"}  # dtypes of torch for codes that it has none for


def limits(dtype: str) -> tuple[int, int]:
    """The smallest and the largest code of a dtype."""
    bits = int(dtype.lstrip("uint"))
    return (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def tensor(values: Mapping[str, Any]) -> Any:
    """x as a tensor of the dtype that `x_dtype` says, which NumPy may lack."""
    torch = need("torch", "torch", "engine torch")
    dtype = values.get("x_dtype")
    array = np.asarray(values["x"])
    made = torch.from_numpy(array if array.ndim and all(s > 0 for s in array.strides) else array.copy())
    return made.to(getattr(torch, dtype)) if dtype else made


def number(value: Any) -> float:
    return float(np.asarray(value).reshape(()))


def flat(value: Any, dtype: str) -> Any:
    """A vector of scales or zero points as a tensor."""
    torch = need("torch", "torch", "engine torch")
    return torch.from_numpy(np.asarray(value).reshape(-1).astype(dtype))


def quantize(path: Path, values: Mapping[str, Any]) -> np.ndarray:
    """Codes, by the path's kernel."""
    torch, x, dtype = need("torch", "torch", "engine torch"), tensor(values), values["dtype"]
    if path.name == DECOMPOSED:
        need("torch.ao.quantization.fx._decomposed", "torch", "engine torch")
        ops, kind = torch.ops.quantized_decomposed, getattr(torch, WIDER.get(dtype, dtype))
        if "axis" in values:
            scales, zeros = flat(values["scale"], "float32"), flat(values["zero_point"], "int32")
            return ops.quantize_per_channel(x, scales, zeros, values["axis"], *limits(dtype), kind).numpy()
        scale, zero = number(values["scale"]), int(number(values["zero_point"]))
        return ops.quantize_per_tensor(x, scale, zero, *limits(dtype), kind).numpy()
    kind = getattr(torch, f"q{dtype}")
    if path.name == PER_CHANNEL:
        scales, zeros = flat(values["scale"], "float32"), flat(values["zero_point"], "int64")
        return torch.quantize_per_channel(x, scales, zeros, values["axis"], kind).int_repr().numpy()
    scale, zero = number(values["scale"]), int(number(values["zero_point"]))
    return torch.quantize_per_tensor(x, scale, zero, kind).int_repr().numpy()


def dequantize(path: Path, values: Mapping[str, Any]) -> np.ndarray:
    """Real numbers, by the path's kernel."""
    torch = need("torch", "torch", "engine torch")
    code = torch.from_numpy(np.array(values["code"]))
    dtype = values.get("dtype", str(values["code"].dtype))
    if path.name == DECOMPOSED:
        need("torch.ao.quantization.fx._decomposed", "torch", "engine torch")
        ops, kind = torch.ops.quantized_decomposed, getattr(torch, WIDER.get(dtype, dtype))
        if "axis" in values:
            scales, zeros = flat(values["scale"], "float32"), flat(values["zero_point"], "int32")
            return ops.dequantize_per_channel(code, scales, zeros, values["axis"], *limits(dtype), kind).numpy()
        scale, zero = number(values["scale"]), int(number(values["zero_point"]))
        return ops.dequantize_per_tensor(code, scale, zero, *limits(dtype), kind).numpy()
    if path.name == PER_CHANNEL:
        scales, zeros = flat(values["scale"], "float32"), flat(values["zero_point"], "int64")
        return torch._make_per_channel_quantized_tensor(code, scales, zeros, values["axis"]).dequantize().numpy()
    scale, zero = number(values["scale"]), int(number(values["zero_point"]))
    return torch._make_per_tensor_quantized_tensor(code, scale, zero).dequantize().numpy()


def fake_quantize(path: Path, values: Mapping[str, Any]) -> np.ndarray:
    """Quantized and dequantized, by the path's kernel."""
    torch, x = need("torch", "torch", "engine torch"), tensor(values)
    form = path.name.removeprefix(FAKE).removeprefix("-")
    if "axis" in values and path.name not in BY_CHANNEL:
        raise ValueError(f"{path.name} has one scale")
    low, high = int(values["code_min"]), int(values["code_max"])
    scale, zero = flat(values["scale"], "float32"), flat(values["zero_point"], "int32")
    if form == "":
        y = torch.fake_quantize_per_tensor_affine(x, number(values["scale"]), int(zero[0]), low, high)
    elif form == "tensor":
        y = torch.fake_quantize_per_tensor_affine(x, scale[0], zero[0], low, high)
    elif form == "channel":
        y = torch.fake_quantize_per_channel_affine(x, scale, zero, values["axis"], low, high)
    elif form == "learnable":
        y = torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero.float(), low, high, 1.0)
    else:
        learnable = torch._fake_quantize_learnable_per_channel_affine
        y = learnable(x, scale, zero.float(), values["axis"], low, high, 1.0)
    return (y.float() if y.dtype == torch.bfloat16 else y).numpy()


def choose_scale(path: Path, values: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of a range: by the min-max observers, or the decomposed operator."""
    torch, dtype = need("torch", "torch", "engine torch"), values["dtype"]
    low, high = np.float32(values["low"]), np.float32(values["high"])
    code_min, code_max = values.get("code_min", limits(dtype)[0]), values.get("code_max", limits(dtype)[1])
    symmetric = bool(values.get("symmetric", False))
    if path.name == DECOMPOSED:
        need("torch.ao.quantization.fx._decomposed", "torch", "engine torch")
        name = "choose_qparams_symmetric" if symmetric else "choose_qparams"
        choose = getattr(torch.ops.quantized_decomposed, name).tensor
        eps = float(np.finfo(np.float32).eps)
        pairs = [
            choose(torch.tensor([a, b]), code_min, code_max, eps, getattr(torch, WIDER.get(dtype, dtype)))
            for a, b in zip(low.ravel().tolist(), high.ravel().tolist(), strict=True)
        ]
        scale, zero = (np.array([float(pair[i]) for pair in pairs]).reshape(low.shape) for i in (0, 1))
        return scale, zero.astype(np.int32)
    observers = need("torch.ao.quantization.observer", "torch", "engine torch")
    scheme = torch.per_channel_symmetric if symmetric else torch.per_channel_affine
    observer = observers.PerChannelMinMaxObserver(
        dtype=getattr(torch, f"q{dtype}"), qscheme=scheme, quant_min=code_min, quant_max=code_max
    )
    observer.min_val, observer.max_val = flat(low, "float32"), flat(high, "float32")
    scale, zero = observer.calculate_qparams()
    return scale.numpy().reshape(low.shape), zero.numpy().reshape(low.shape)


def cast(path: Path, values: Mapping[str, Any]) -> np.ndarray:
    """Codes of a float format."""
    torch = need("torch", "torch", "engine torch")
    return tensor(values).to(getattr(torch, FORMATS[values["format"]])).view(torch.uint8).numpy()


SINGLE: dict[str, tuple[Callable[[Path, Mapping[str, Any]], np.ndarray], str]] = {
    "quantize": (quantize, "code"),
    "dequantize": (dequantize, "y"),
    "fake_quantize": (fake_quantize, "y"),
    "cast": (cast, "code"),
    "linear": (run_linear, "y"),
    "matmul": (multiply, "accumulator"),
}


def run(path: Path, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What torch gives, on one thread."""
    need("torch", "torch", "engine torch").set_num_threads(1)
    if path.op == "scale":
        scale, zero = choose_scale(path, values)
        return {"scale": scale, "zero_point": zero}
    kernel, name = SINGLE[path.op]
    if path.name in BY_CHANNEL and "axis" not in values:  # one scale: a tensor of one channel
        given = "code" if path.op == "dequantize" else "x"
        return {name: kernel(path, {**values, given: values[given][None], "axis": 0})[0]}
    return {name: kernel(path, values)}
