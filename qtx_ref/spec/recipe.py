"""Recipes: which site gets which quantizer, what its linear does to its input before, and how weights are made anew."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from .base import Name, Spec, refuse
from .gradients import Gradients
from .quant import Quant

__all__ = ["InputTransform", "Recipe", "Rewrite", "Rule", "Transform", "TransformKind"]


@dataclass(frozen=True)
class Rule(Spec):
    """Sites that match one of `sites` (shell patterns) get `quant`; None leaves them in float."""

    sites: tuple[str, ...]
    quant: Quant | None
    source: str  # where the choice comes from, or "assumed"


class TransformKind(Name):
    """What happens to a linear's input before its quantizer sees it; the weight is rewritten to match."""

    SMOOTH = "smooth"  # x / s and W s: SmoothQuant (Xiao et al. 2023, eq. 4)
    HADAMARD = "hadamard"  # x R and W R, R orthonormal, block-diagonal, of Sylvester's Hadamard matrices


@dataclass(frozen=True)
class Transform(Spec):
    """Linear sites that match one of `sites` (shell patterns, such as layer.*.ffn.hidden) get this transform."""

    sites: tuple[str, ...]
    kind: TransformKind
    source: str  # where the choice comes from, or "assumed"
    strength: float | None = None  # SMOOTH: migration strength alpha, in [0, 1]
    block: int | None = None  # HADAMARD: a power of two that divides the width; None: the largest that does

    def check(self) -> None:
        smooth = self.kind is TransformKind.SMOOTH
        if smooth and (self.strength is None or not 0 <= self.strength <= 1):
            refuse("transform strength", self.strength, "smooth needs a migration strength in [0, 1], for example 0.5")
        if not smooth and self.strength is not None:
            refuse("transform strength", self.strength, "it belongs to smooth")
        if smooth and self.block is not None:
            refuse("transform block", self.block, "it belongs to hadamard")
        if self.block is not None and (self.block < 2 or self.block & (self.block - 1)):
            refuse("transform block", self.block, "give a power of two, at least 2")


class InputTransform(NamedTuple):
    """What a linear does to its input x before it quantizes it: (x / divisor) R, R of blocks of `block`."""

    divisor: Any  # float32 (I,), or None
    block: int  # of the Hadamard rotation, 0 for none


class Rewrite(Name):
    """How weights or biases are changed once, after calibration, for what quantization makes of them."""

    BIAS = "bias_correction"  # b + (W - Q(W)) E[x] (Nagel et al. 2019)
    GPTQ = "gptq"  # Frantar et al. 2023
    ADAROUND = "adaround"  # Nagel et al. 2020


@dataclass(frozen=True)
class Recipe(Spec):
    """Which site is quantized, and how. The last rule that matches a site decides; a site without one stays in float.
    So does the last of `transforms` that matches a linear; `rewrite` is done once the ranges stand.

    A static range is calibrated on `batches` batches; `quantize_while_calibrating` feeds each observer tensors that
    earlier sites have already quantized, as the published simulator does; `masked_scores` lets the scores of keys that
    the mask will remove enter the range of `scores` (only the paper's recipes do). `gradients`: what the
    backward pass of every matmul quantizes.
    """

    name: str
    rules: tuple[Rule, ...]
    batches: int = 16
    quantize_while_calibrating: bool = False
    masked_scores: bool = False
    transforms: tuple[Transform, ...] = ()
    rewrite: Rewrite | None = None
    gradients: Gradients | None = None

    def check(self) -> None:
        if self.batches < 1:
            refuse("recipe batches", self.batches, "calibration needs at least 1")

    def quant(self, site: str) -> Quant | None:
        """The quantizer of `site`, or None."""
        for rule in reversed(self.rules):
            if any(fnmatchcase(site, pattern) for pattern in rule.sites):
                return rule.quant
        return None

    def transform(self, site: str) -> Transform | None:
        """The transform at the input of the linear `site`, or None."""
        for one in reversed(self.transforms):
            if any(fnmatchcase(site, pattern) for pattern in one.sites):
                return one
        return None
