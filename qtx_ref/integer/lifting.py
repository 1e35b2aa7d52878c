"""Back from integers, in float64: what an output stands for, and the parameters that a model's constants stand for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..models.initial import shapes
from ..spec import ModelSpec, Output
from . import ops


def real(output: Output) -> np.ndarray:
    """The numbers that an integer model's output stands for, float64."""
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
    """From the code below each logit and the factor above it."""
    scores = site.replace(".probs", ".scores")
    whole = constants[f"{site}.sink"] - constants[f"{scores}.zero_point"]
    part = np.log(constants[f"{site}.sink_factor"] / 2.0**ops.SINK_BITS)
    return constants[f"{scores}.scale"].astype(np.float64) * whole + part
