"""Quantizers: rounding, scales, codes, ranges, and weights made anew for them."""
