"""Small floating-point formats and the scales that blocks of them share."""

from __future__ import annotations

from .base import Name

__all__ = ["FloatFormat", "SharedScale"]


class FloatFormat(Name):
    """Small floats (OCP 8-bit floating point, 2023; OCP microscaling formats, 2023)."""

    E4M3 = "e4m3"  # 4 exponent bits, 3 of mantissa; largest 448, no infinity, one NaN per sign ("fn")
    E5M2 = "e5m2"  # IEEE style; largest 57344
    E2M1 = "e2m1"  # 0, 0.5, 1, 1.5, 2, 3, 4, 6; neither infinity nor NaN


class SharedScale(Name):
    """Exponent of an MX block's scale from its largest magnitude; emax is the element's largest exponent."""

    FLOOR = "floor"  # floor(log2(absmax)) - emax: the OCP text
    CEIL = "ceil"  # ceil(log2(absmax)) - emax
    EVEN = "even"  # absmax rounded to the element's mantissa first (ties up), then floor
    RCEIL = "rceil"  # ceil(log2(absmax / the element's largest value)), the quotient in float32
