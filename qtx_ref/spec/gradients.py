"""What a backward pass quantizes: the operands of the two products that make a matmul's gradients."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Spec, refuse
from .quant import FloatQuantSpec, Granularity, Quant

__all__ = ["Gradients", "Operand"]


@dataclass(frozen=True)
class Operand(Spec):
    """How one operand of a product is quantized, each time from the tensor itself.

    `token` is a scale for each row across the axis that the product sums over, which is the operand's last once it is
    turned so: the finest that integers allow. `tensor` is one scale; `block`, small floats alone, splits the summed
    axis as MX does, which is fake quantization only. stochastic: up with the probability of the remainder.
    """

    quant: Quant
    stochastic: bool = False

    def check(self) -> None:
        quant = self.quant
        if not quant.dynamic:
            refuse("gradient operand dynamic", False, "its range is taken from the tensor itself; set dynamic")
        if (
            not quant.symmetric
            or quant.outliers is not None
            or getattr(quant, "narrow", False)
            or quant.axis is not None
        ):
            refuse(
                "gradient operand", quant, "give a symmetric quantizer with all its codes, no channel apart and no axis"
            )
        known = (Granularity.TOKEN, Granularity.TENSOR)
        if quant.granularity not in known and not (
            isinstance(quant, FloatQuantSpec) and quant.granularity is Granularity.BLOCK
        ):
            remedy = "give token (a scale per row across the summed axis), tensor or, of small floats, block"
            refuse("gradient operand granularity", str(quant.granularity), remedy)


@dataclass(frozen=True)
class Gradients(Spec):
    """What the two products behind a matmul quantize; None: that operand stays as it is.

    y = x W^T has dX = dY W, which sums over outputs (`dgrad`), and dW = dY^T X, which sums over tokens (`wgrad`).
    y = A B, of activations, has dA = dY B^T and dB = A^T dY: B stands where W does, A where X does. Every operand is
    quantized anew from what the forward product took in.
    """

    dgrad_gradient: Operand | None = None  # dY of dX = dY W: `token` is a scale per token
    dgrad_weight: Operand | None = None  # W: a scale per input channel
    wgrad_gradient: Operand | None = None  # dY of dW = dY^T X: a scale per output channel
    wgrad_input: Operand | None = None  # X: a scale per input channel

    def check(self) -> None:
        if not any((self.dgrad_gradient, self.dgrad_weight, self.wgrad_gradient, self.wgrad_input)):
            refuse("gradients", None, "quantize at least one of the four operands, or leave gradients out")
