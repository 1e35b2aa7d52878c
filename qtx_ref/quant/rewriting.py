"""Weights made anew for quantization, once and for both backends: what is moved between a tensor and the weight that
takes it in (SmoothQuant, Hadamard rotation), and what bias correction makes of the error that is left.
`rounding_choice` has GPTQ and AdaRound.

Arrays: parameters by name, weights (O, I), or (H, O, I) with a matrix per head, and biases (O,); float32, computed with
in float64 and rounded at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from .. import ops
from ..spec import Gate, ModelSpec, Quant, Range, SpecError
from ..tape import const
from .quantizer import dynamic_scale, fake_quantize

__all__ = [
    "Arrays",
    "columns",
    "correct_bias",
    "feeding_norm",
    "group_by_input",
    "hadamard_block",
    "own_weight",
    "rotate",
    "round_like",
    "simulate_weight",
    "smooth",
]

Arrays = dict[str, np.ndarray]
LARGEST = 2.0**40  # of a divisor and of its reciprocal; a channel beyond, which is 0 but for dust, is left alone


def own_weight(params: Mapping[str, np.ndarray], site: str) -> np.ndarray:
    """The weight of a linear. Raises SpecError where it has none of its own: rewriting would change another op."""
    if f"{site}.weight" not in params:
        raise SpecError(f"site {site} has no weight of its own to rewrite: leave it out")
    return params[f"{site}.weight"]


def columns(weight: np.ndarray) -> np.ndarray:
    """The largest magnitude of each input channel, float64: (O, I) -> (I,); per head, (H, O, I) -> (H I,)."""
    return np.abs(weight.astype(np.float64)).max(axis=-2).reshape(-1)


def hadamard_block(weight: np.ndarray, block: int | None, site: str) -> int:
    """The block of a rotation of what `site` takes in: as asked, or the largest power of two that divides its width (a
    head's, where there is a matrix per head). Raises SpecError where the block does not divide it, or only 1 does."""
    width = weight.shape[-1]
    size = block or width & -width
    if size < 2 or width % size:
        raise SpecError(
            f"transform block {size} at {site}, of width {width}: give a power of two that divides it, above 1"
        )
    return size


def group_by_input(sites: Iterable[str]) -> list[tuple[str, ...]]:
    """`sites` in groups of linears that take in the same tensor: query, key and value; each other alone."""
    groups: dict[str, list[str]] = {}
    for site in sites:
        block, _, name = site.rpartition(".")
        shared = name in ("query", "key", "value") and block.endswith(".attn")
        groups.setdefault(block if shared else site, []).append(site)
    return [tuple(group) for group in groups.values()]


def feeding_norm(spec: ModelSpec, group: tuple[str, ...]) -> str | None:
    """The norm whose result goes to the linears of `group` and nowhere else, or None: in a pre-norm block `attn.norm`
    for query, key and value together where no gate reads it, `ffn.norm` for the hidden layer."""
    block, _, name = group[0].rpartition(".")
    if not spec.pre_norm or not group[0].startswith("layer."):
        return None
    if name == "hidden":
        return f"{block}.norm"
    silent = spec.attention.gate in (Gate.NONE, Gate.HEAD)
    return f"{block}.norm" if len(group) == 3 and silent else None


def smooth(
    spec: ModelSpec,
    params: Mapping[str, np.ndarray],
    absmax: Mapping[str, np.ndarray],
    strength: float,
    sites: Iterable[str],
) -> tuple[Arrays, Arrays]:
    """SmoothQuant (Xiao et al. 2023, eq. 4): s_j = max|X_j|^a / max|W_j|^(1 - a), W' = W s, and X' = X / s.

    absmax: max|X_j| (I,) of each of `sites`; the linears that take in one tensor share s, with the largest of their
    weights. Channels in which X or W is 0 have s = 1. The division is taken into gain and bias of the norm before,
    where that feeds nothing else (`feeding_norm`).

    Returns:
        params, and the divisors (I,), float32, that no norm took in, by linear site.
    Raises SpecError naming a site without a weight of its own.
    """
    made: Arrays = dict(params)
    divisors: Arrays = {}
    for group in group_by_input(sites):
        x = np.maximum.reduce([np.asarray(absmax[site], np.float64) for site in group])
        w = np.maximum.reduce([columns(own_weight(params, site)) for site in group])
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            s = x**strength / w ** (1 - strength)
        s = np.where((x > 0) & (w > 0) & (s > 1 / LARGEST) & (s < LARGEST), s, 1.0).astype(np.float32)
        for site in group:
            weight = params[f"{site}.weight"]
            rows = s.reshape(-1, 1, weight.shape[-1]) if weight.ndim == 3 else s
            made[f"{site}.weight"] = round_like(weight.astype(np.float64) * rows, weight)
        norm = feeding_norm(spec, group)
        if norm is None:
            divisors |= {site: s for site in group}
        else:
            for name in (f"{norm}.weight", f"{norm}.bias"):
                made[name] = round_like(params[name].astype(np.float64) / s, params[name])
    return made, divisors


def rotate(params: Mapping[str, np.ndarray], blocks: Mapping[str, int]) -> Arrays:
    """W' = W R for each site of `blocks`, so that (x R) (W R)^T = x W^T; R as in `ops.hadamard`, of blocks
    `blocks[site]`.

    Raises SpecError naming a site without a weight of its own, or a block that does not divide its width.
    """
    made = dict(params)
    for site, given in blocks.items():
        weight = own_weight(params, site)
        block = hadamard_block(weight, given, site)
        made[f"{site}.weight"] = round_like(ops.hadamard(const(weight.astype(np.float64)), block).value, weight)
    return made


def simulate_weight(weight: np.ndarray, quant: Quant, range: Range | None) -> np.ndarray:
    """Q(W): what the quantizer makes of a weight, by its static range or, without one, its own."""
    scale, zero = dynamic_scale(weight, quant, None, True) if range is None else (range.scale, range.zero_point)
    return fake_quantize(weight, scale, zero, quant)[0]


def correct_bias(
    params: Mapping[str, np.ndarray],
    quants: Mapping[str, Quant],
    ranges: Mapping[str, Range],
    means: Mapping[str, np.ndarray],
) -> Arrays:
    """b' = b + (W - Q(W)) E[x] for each linear of `means`, E[x] (I,): the mean error that quantizing W gives its result
    (Nagel et al. 2019, section 4.2) is taken from the bias. Linears without a bias are left as they are."""
    made = dict(params)
    for site, mean in means.items():
        if f"{site}.bias" not in params:
            continue
        weight, bias = own_weight(params, site), params[f"{site}.bias"]
        error = weight.astype(np.float64) - simulate_weight(
            weight, quants[f"{site}.weight"], ranges.get(f"{site}.weight")
        )
        x = np.asarray(mean, np.float64).reshape(*weight.shape[:-2], weight.shape[-1], 1)
        made[f"{site}.bias"] = round_like(bias.astype(np.float64) + (error @ x)[..., 0], bias)
    return made


def round_like(value: np.ndarray, like: np.ndarray) -> np.ndarray:
    """A value in float64 as the parameter that it takes the place of: in the dtype of `like`."""
    return value.astype(like.dtype)
