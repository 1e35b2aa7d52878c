"""The modules that are swept, and what draws their configurations.

A chain takes the backend's module (`qtx_ref.quant.affine` or `qtx_torch.quant.affine`, ...): functions and parameters
have the same names. `DRAWS[module](index, codes)` draws configuration `index`: each axis goes through all its values,
in an order of its own, before it repeats one, so n configurations meet every value of every axis with at most n values.
"""

from __future__ import annotations

from parity_tests.sweep.integers import draw_fixed, draw_groups, draw_integer
from parity_tests.sweep.quantizers import draw_affine, draw_formats

# where each module is, in either backend
MODULES = {
    "affine": "quant.affine",
    "fixed_point": "integer.fixed_point",
    "integer": "integer.products",
    "formats": "quant.formats",
    "groups": "integer.groups",
}
DRAWS = {
    "affine": draw_affine,
    "fixed_point": draw_fixed,
    "integer": draw_integer,
    "formats": draw_formats,
    "groups": draw_groups,
}
