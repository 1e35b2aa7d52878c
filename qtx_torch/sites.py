"""Sites: the named tensors of a model, each a submodule whose path is its name.

Not in the reference: there a site is a string, and parameters are a dict.

A site holds its parameters and one slot for every tensor that may be seen or replaced there: its result, each operand
of a product, its weight. A slot is None or a module called with (tensor, mask of elements that count or None) and, but
for weights, the mask of spared elements or None; the model goes on with its result. `attach` fills slots by key:
`layer.0.attn.query` is the site's result, `layer.0.attn.query.input` and `.weight`, `layer.0.attn.scores.lhs` and
`.rhs` what goes into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from qtx_ref.spec import SpecError


class SiteModule(nn.Module):
    """A named tensor. `site`, its name, is set when the model is built."""

    def __init__(self, *operands: str, **shapes: tuple[int, ...]) -> None:
        """operands: slots beside the result's; shapes: parameters."""
        super().__init__()
        self.site = ""
        self.slots = (*operands, "output")
        for slot in self.slots:
            setattr(self, f"on_{slot}", None)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class Linear(SiteModule):
    """weight (O, I) and bias (O,), or one of each per head: (H, O, I) and (H, O). `tied` names another's weight,
    where it has none of its own. `transform`, None or a module, is what happens to its input before any slot sees
    it."""

    def __init__(self, outputs: int, inputs: int, *, heads: int = 0, bias: bool = True, tied: str = "") -> None:
        lead = (heads,) if heads else ()
        shapes = {} if tied else {"weight": (*lead, outputs, inputs)}
        super().__init__("input", "weight", **shapes, **({"bias": (*lead, outputs)} if bias else {}))
        self.tied = tied
        self.transform = None
        if not bias:
            self.bias = None


class Embedding(SiteModule):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__("weight", weight=(rows, width))


class Norm(SiteModule):
    def __init__(self, width: int) -> None:
        super().__init__("weight", weight=(width,), bias=(width,))


class Product(SiteModule):
    """A matmul of two activations."""

    def __init__(self) -> None:
        super().__init__("lhs", "rhs")


def name_sites(net: nn.Module) -> None:
    """Tells each site's module its path, which is the site."""
    for path, module in net.named_modules():
        if isinstance(module, SiteModule):
            module.site = path


def slots(net: nn.Module) -> dict[str, tuple[SiteModule, str]]:
    """Every slot of a model by its key: the site's module and the attribute."""
    by_key = {}
    for module in net.modules():
        if isinstance(module, SiteModule):
            for slot in module.slots:
                by_key[module.site if slot == "output" else f"{module.site}.{slot}"] = (module, f"on_{slot}")
    return by_key


def attach(net: nn.Module, hooks: Mapping[str, nn.Module]) -> None:
    """Puts each hook into the slot of its key and empties all others. Raises SpecError naming an unknown key."""
    known = slots(net)
    for site in hooks:
        if site not in known:
            raise SpecError(f"site {site!r} is not one of this model's: they are such as {', '.join(list(known)[:3])}")
    for site, (module, slot) in known.items():
        if getattr(module, slot) is not None:
            delattr(module, slot)
        setattr(module, slot, hooks.get(site))


@contextmanager
def swap_hooks(net: nn.Module, hooks: Mapping[str, nn.Module]) -> Iterator[None]:
    """`attach` for the length of a `with` block; what was there before comes back."""
    held = {site: getattr(module, slot) for site, (module, slot) in slots(net).items()}
    before = {site: hook for site, hook in held.items() if hook is not None}
    attach(net, hooks)
    try:
        yield
    finally:
        attach(net, before)


@contextmanager
def swap_transforms(net: nn.Module, transforms: Mapping[str, nn.Module]) -> Iterator[None]:
    """`transform` for the length of a `with` block; what was there before comes back."""
    before = {site: module.transform for site, module in linears(net).items() if module.transform is not None}
    transform(net, transforms)
    try:
        yield
    finally:
        transform(net, before)


def linears(net: nn.Module) -> dict[str, Linear]:
    """Every linear of a model by its site."""
    return {module.site: module for module in net.modules() if isinstance(module, Linear)}


def transform(net: nn.Module, transforms: Mapping[str, nn.Module]) -> None:
    """Puts each transform at the input of its linear and takes all others away. Raises SpecError naming an unknown
    one."""
    known = linears(net)
    for site in transforms:
        if site not in known:
            raise SpecError(f"site {site!r} is no linear of this model: they are such as {', '.join(list(known)[:3])}")
    for site, module in known.items():
        if module.transform is not None:
            del module.transform
        module.transform = transforms.get(site)
