"""Sites: the named tensors of a model, each a submodule whose path is its name.

A site holds its parameters and one slot for every tensor that may be seen or replaced there: its result, each operand
of a product, its weight. A slot is None or a module called with (tensor, mask of elements that count or None), whose
result the model goes on with. `attach` fills slots by key: `layer.0.attn.query` is the site's result,
`layer.0.attn.query.input` and `.weight`, `layer.0.attn.scores.lhs` and `.rhs` what goes into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from qtx_ref.spec import SpecError


class Site(nn.Module):
    """A named tensor. `name` is set when the model is built."""

    def __init__(self, *operands: str, **shapes: tuple[int, ...]) -> None:
        """operands: slots beside the result's; shapes: parameters."""
        super().__init__()
        self.name = ""
        self.slots = (*operands, "output")
        for slot in self.slots:
            setattr(self, f"on_{slot}", None)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class Linear(Site):
    """weight (O, I) and bias (O,), or one of each per head: (H, O, I) and (H, O). `tied` names another's weight,
    where it has none of its own. `transform`, None or a module, is what happens to its input before any slot sees it."""

    def __init__(self, outputs: int, inputs: int, *, heads: int = 0, bias: bool = True, tied: str = "") -> None:
        lead = (heads,) if heads else ()
        shapes = {} if tied else {"weight": (*lead, outputs, inputs)}
        super().__init__("input", "weight", **shapes, **({"bias": (*lead, outputs)} if bias else {}))
        self.tied = tied
        self.transform = None
        if not bias:
            self.bias = None


class Embedding(Site):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__("weight", weight=(rows, width))


class Norm(Site):
    def __init__(self, width: int) -> None:
        super().__init__("weight", weight=(width,), bias=(width,))


class Product(Site):
    """A matmul of two activations."""

    def __init__(self) -> None:
        super().__init__("lhs", "rhs")


def name_sites(net: nn.Module) -> None:
    """Tells each site its path."""
    for path, module in net.named_modules():
        if isinstance(module, Site):
            module.name = path


def slots(net: nn.Module) -> dict[str, tuple[Site, str]]:
    """Every slot of a model by its key: the site and the attribute."""
    found = {}
    for site in net.modules():
        if isinstance(site, Site):
            for slot in site.slots:
                found[site.name if slot == "output" else f"{site.name}.{slot}"] = (site, f"on_{slot}")
    return found


def attach(net: nn.Module, hooks: Mapping[str, nn.Module]) -> None:
    """Puts each hook into the slot of its key and empties all others. Raises SpecError naming an unknown key."""
    known = slots(net)
    for key in hooks:
        if key not in known:
            raise SpecError(f"site {key!r} is not one of this model's: they are such as {', '.join(list(known)[:3])}")
    for key, (site, slot) in known.items():
        if getattr(site, slot) is not None:
            delattr(site, slot)
        setattr(site, slot, hooks.get(key))


@contextmanager
def attached(net: nn.Module, hooks: Mapping[str, nn.Module]) -> Iterator[None]:
    """`attach` for the length of a `with` block; what was attached before comes back."""
    before = {key: getattr(site, slot) for key, (site, slot) in slots(net).items() if getattr(site, slot) is not None}
    attach(net, hooks)
    try:
        yield
    finally:
        attach(net, before)


@contextmanager
def transforming(net: nn.Module, transforms: Mapping[str, nn.Module]) -> Iterator[None]:
    """`transform` for the length of a `with` block; what was there before comes back."""
    before = {site.name: site.transform for site in linears(net).values() if site.transform is not None}
    transform(net, transforms)
    try:
        yield
    finally:
        transform(net, before)


def linears(net: nn.Module) -> dict[str, Linear]:
    """Every linear of a model by its name."""
    return {site.name: site for site in net.modules() if isinstance(site, Linear)}


def transform(net: nn.Module, transforms: Mapping[str, nn.Module]) -> None:
    """Puts each transform at the input of its linear and takes all others away. Raises SpecError naming an unknown one."""
    known = linears(net)
    for name in transforms:
        if name not in known:
            raise SpecError(f"site {name!r} is no linear of this model: they are such as {', '.join(list(known)[:3])}")
    for name, site in known.items():
        if site.transform is not None:
            del site.transform
        site.transform = transforms.get(name)
