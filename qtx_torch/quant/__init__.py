"""Quantizers: rounding, scales, codes and ranges, as in the reference."""
