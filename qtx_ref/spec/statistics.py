"""The names and limits of outlier statistics; `stats` of each backend computes them."""

from __future__ import annotations

__all__ = ["BINS", "DROPPED", "MOMENTS", "SIGMAS", "STATISTICS"]

# an outlier is farther than this many deviations from the mean of its own sequence
SIGMAS = 6.0
# of |x|: the eight exponent bits of a float32 and the first six bits of its fraction
BINS = 2**14
# bits of the fraction that a bin does not tell apart
DROPPED = 17
# of one tensor, as `stats.describe` gives them
STATISTICS = (
    "inf_norm",
    "kurtosis_published",
    "kurtosis",
    "moments",
    "lowest",
    "highest",
    "energy",
    "histogram",
    "beyond_channels",
    "beyond_tokens",
)
# of a linear's input, as `stats.moments` gives them
MOMENTS = ("count", "sum", "absmax", "gram")
