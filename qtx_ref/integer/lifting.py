"""Back from integers, in float64: what an output stands for, and the parameters that a model's constants stand for.

Arrays: constants by name, as `model` lists them, in the dtypes that `lowering` made; parameters in the shapes that
`models.initial.shapes` gives.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..models.initial import shapes
from ..spec import ModelSpec, Output
from . import ops

__all__ = ["float_params", "real", "sink_logits"]


def real(output: Output) -> np.ndarray:
    """The numbers that an integer model's output stands for, float64, in its shape."""
    return output.scale * (output.value.astype(np.int64) - output.zero_point)


def float_params(spec: ModelSpec, constants: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The float32 parameters that the constants of an integer model stand for, for the same model under FakeQuant."""
    params = {}
    for name, shape in shapes(spec).items():
        site = name.rpartition(".")[0]
        if name.endswith(".sink"):
            value = sink_logits(constants, site)
        elif constants[name].dtype.kind == "f":
            value = constants[name]
        else:
            scale, zero = constants[f"{name}.scale"], constants.get(f"{name}.zero_point", 0)
            value = np.asarray(scale, np.float64) * (constants[name].astype(np.int64) - zero)
        params[name] = value.astype(np.float32).reshape(shape)
    return params


def sink_logits(constants: Mapping[str, np.ndarray], site: str) -> np.ndarray:
    """The logits (H,) or (1,), float64, from the code below each and the factor above it."""
    scores = site.replace(".probs", ".scores")
    whole = constants[f"{site}.sink"] - constants[f"{scores}.zero_point"]
    part = np.log(constants[f"{site}.sink_factor"] / 2.0**ops.SINK_BITS)
    return constants[f"{scores}.scale"].astype(np.float64) * whole + part
