"""torch's own dynamic int8, run beside us.

Not in the reference: it is torch's engine, and takes torch's tensors.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..backend import Model
from ..numerics import Float
from ..sites import SiteModule, linears


class DynamicInt8(Float):
    """torch's dynamic int8: weights in int8 with one scale each, activations measured as they come, float32 results.

    As `torch.ao.quantization.quantize_dynamic` sets up `nn.Linear`: weights by absmax / 127.5, activations in 7 bits,
    which its u8 x s8 kernels need where pairs saturate in int16. Linears of one matrix only: a gate per head stays in
    float. The float weights that it replaces are let go.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.packed: dict[str, object] = {}
        modules = linears(model.net)
        tied = {module.tied for module in modules.values()}
        weights = dict(model.weights)
        for site, module in modules.items():
            name = module.tied or f"{site}.weight"
            if weights[name].ndim != 2:
                continue
            self.packed[site] = pack(weights[name].detach(), module.bias)
            if name not in tied:
                module.weight = nn.Parameter(torch.empty(0))
                del model.weights[name]

    def linear(self, module: SiteModule, x: Tensor, *, weight: Tensor | None = None, named: bool = True) -> Tensor:
        if module.site not in self.packed:
            return super().linear(module, x, weight=weight, named=named)
        y = torch.ops.quantized.linear_dynamic(x, self.packed[module.site], True)
        return self._named(module, y) if named else y


def pack(weight: Tensor, bias: Tensor | None) -> object:
    """An int8 weight as torch's kernels keep it."""
    scale = max(weight.abs().max().item() / 127.5, torch.finfo(torch.float32).eps)
    with warnings.catch_warnings():  # torch 2.13 announces the end of these tensors
        warnings.simplefilter("ignore")
        code = torch.quantize_per_tensor(weight.float(), scale, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(code, None if bias is None else bias.detach().float())
