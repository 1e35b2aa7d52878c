"""Our own models as runners.

Not in the reference: it keeps no result on a device, so that its models are runners as they are.

A runner takes a batch to the device once (`inputs`), is called with it, and leaves its result where it is; `output`
fetches it. So latency is that of the pass alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from qtx_ref.spec import Output

from ..arrays import Batch, to_numpy
from ..backend import IntegerModel, Model
from ..integer.model import Code
from ..numerics import Float, Record
from ..sites import attach


class FloatRunner:
    """A float or fake-quantized model under `nx`."""

    def __init__(self, model: Model, nx: Float | None = None) -> None:
        self.model = model
        self.nx = nx or Float()
        self.device = model.device

    def inputs(self, batch: Batch) -> dict[str, Tensor | None]:
        return self.model.accept(batch)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor | None]) -> Tensor:
        return self.model.compute(self.nx, inputs)

    def output(self, result: Tensor) -> np.ndarray:
        return to_numpy(result)


class IntegerRunner:
    """A model in integers."""

    def __init__(self, model: IntegerModel) -> None:
        self.model = model
        self.device = model.device

    def inputs(self, batch: Batch) -> dict[str, Tensor | None]:
        return self.model.accept(batch)

    def __call__(self, inputs: Mapping[str, Tensor | None]) -> Code:
        return self.model.compute(self.model.make_numerics(), inputs)

    def output(self, result: Code) -> Output:
        return self.model.read_output(result)


def make_bfloat16_runner(model: Model) -> FloatRunner:
    """The model with its parameters, and so all its arithmetic, in bfloat16: not autocast, which rounds float32
    parameters anew in every pass."""
    model.net.to(torch.bfloat16)
    return FloatRunner(model)


def unfuse(model: Model) -> Model:
    """The model with probabilities that somebody looks at, so that no fused kernel stands in for its attention."""
    sites = [f"layer.{i}.attn.probs" for i in range(model.spec.layers)]
    attach(model.net, {site: Record(site, lambda site, value, where: None) for site in sites})
    return model
