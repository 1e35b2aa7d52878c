"""The integer products of an artifact, found by running it, and their operands on real data.

Where scales vary along a sum there is a product for each of them, `<site>[0]`, `<site>[1]`, ...: a group's channels and
its own accumulator. The sum over groups is bounded where its multipliers are made, in `qtx_ref.integer.constants`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from qtx_ref.integer.model import Code, Integer
from qtx_ref.model import IntegerModel
from qtx_ref.spec import Family, MatmulRule, Overflow, Products, accumulator_bits

from ..files.artifact import Artifact
from .certificate_bounds import Operand, Product
from .certificate_groups import split_groups

__all__ = ["Show", "read_artifact_products", "run_artifact"]

Show = Callable[[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]  # product, codes and zero points of both
EXACT = MatmulRule(products=Products.EXACT, run=1, overflow=Overflow.WRAP)


class Watched(Integer):
    """Shows each product's operands before it is computed."""

    see: Callable[[str, Code, Code, np.ndarray | None], None]
    weights: dict[str, str]

    def linear(self, site: str, x: Code, *, weight: str | None = None, named: bool = True) -> Code:
        self.weights[site] = weight or f"{site}.weight"
        return super().linear(site, x, weight=weight, named=named)

    def matmul(self, site: str, a: Code, b: Code, bias: np.ndarray | None = None) -> np.ndarray:
        self.see(site, a, b, bias)
        return super().matmul(site, a, b, bias)

    def weigh(self, site: str, a: Code, b: Code, bias: np.ndarray | None = None) -> np.ndarray:
        for number, pair in enumerate(split_groups(a, b, self.constants[f"{site}.channel_multiplier"])):
            self.see(f"{site}[{number}]", *pair, None)
        return super().weigh(site, a, b, bias)


class WatchedModel(IntegerModel):
    """The model of an artifact, its sums exact whatever its profile says: overflow is judged, not refused."""

    def __init__(self, artifact: Artifact, see: Callable[[str, Code, Code, np.ndarray | None], None]) -> None:
        profile = replace(artifact.profile, matmul=EXACT)
        super().__init__(artifact.spec, artifact.constants, artifact.quants, profile)
        self.see = see
        self.weights: dict[str, str] = {}

    def make_numerics(self, record: Callable[[str, np.ndarray], None] | None = None) -> Integer:
        nx = Watched(self.constants, self.quants, self.profile)
        nx.see, nx.weights = self.see, self.weights
        return nx


def run_artifact(artifact: Artifact, batch: Mapping[str, np.ndarray], show: Show) -> None:
    """Runs a batch and shows each product's operands, (..., M, K) and (..., K, N), with their zero points."""
    WatchedModel(artifact, lambda site, a, b, _: show(site, a.value, a.zero_point, b.value, b.zero_point)).run(batch)


def read_artifact_products(artifact: Artifact) -> list[Product]:
    """Every product of the model, in the order of the forward pass."""
    spec, found = artifact.spec, dict[str, Product]()

    def see(site: str, a: Code, b: Code, bias: np.ndarray | None) -> None:
        base, group, _ = site.partition("[")
        shift = artifact.constants.get(f"{site}.shift")  # a group's is that of the sum over all
        left = make_operand(a)
        wide = bias is not None and bias.dtype == np.int64
        accumulator = 64 if wide else accumulator_bits(a.spec, b.spec)
        if base not in model.weights:  # scores: q and k; context: probabilities and v
            depth = a.shape[-1] if group else spec.head_width if site.endswith(".scores") else spec.length
            found[site] = Product(site, left, make_operand(b), depth, None, shift, accumulator)
            return
        heads, depth, columns = b.value.shape  # one matrix, or one per head on its own slice of x
        codes = np.asarray(b.value).transpose(1, 0, 2).reshape(depth, heads * columns)
        right = replace(make_operand(b), codes=codes.astype(np.int32))
        right = right if right.zero_point is None else replace(right, zero_point=flat(right.zero_point))
        scale = flat(artifact.constants[f"{model.weights[base]}.scale"])
        own = None if bias is None else np.ravel(bias)
        shift = None if shift is None else flat(shift)
        found[site] = Product(site, left, right, depth, own, shift, accumulator, scale)

    model = WatchedModel(artifact, see)
    if spec.family is Family.VIT:
        size = (1, spec.channels, spec.image_size, spec.image_size)
        batch: dict[str, np.ndarray] = {"images": np.zeros(size, np.float32)}
    else:
        token = np.zeros((1, 1), np.int64)
        batch = {"tokens": token, "types": token, "mask": token == 0}
    model.run(batch)
    return list(found.values())


def flat(value: np.ndarray) -> np.ndarray:
    """One number without axes; several along one."""
    return np.reshape(value, () if np.size(value) == 1 else -1)


def make_operand(x: Code) -> Operand:
    """What an activation's quantizer can give."""
    unknown = x.measured and not x.spec.symmetric  # each token has its own zero point
    zero = None if unknown else np.asarray(x.zero_point, np.int64)
    return Operand(x.spec.code_min, x.spec.code_max, zero)
