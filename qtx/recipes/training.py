"""What is quantized while a model trains: both operands of every matmul going forward, and of the gradient products
going back.

Forward names are `train-FORM` and `train-FORM-tensor`, FORM being wXaY, fp8 or one of the MX formats. Backward names
are added to any recipe's: `+gradFORM`, for example `w8a8+grad8` or `fp8+gradfp8:gradient+grad8:weight,input`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from qtx_ref.spec import (
    FloatFormat,
    FloatQuantSpec,
    Gradients,
    Granularity,
    ModelSpec,
    Operand,
    Quant,
    QuantSpec,
    Recipe,
    Rule,
    SpecError,
)

from .parts import FLOATS, MX_BLOCK, MX_TEXT, OPERANDS, TABLES
from .sites import extents

SOURCE = "blog 2025: every matmul of the forward pass, per token, absmax / 127"
CHANNELS = "assumed: one scale per output channel"
ONE = "one scale per tensor, taken from the tensor"
FP8 = {"fp8": FloatFormat.E4M3, "fp8-e5m2": FloatFormat.E5M2}
MX = {name: form for name, form in FLOATS.items() if name.startswith("mx")}
FORMS = (*FP8, *MX)
NAMES = f"train-wXaY, train-{', train-'.join(FORMS)}, each also with -tensor (MX: not)"
OPERAND_NAMES = {
    "gradient": ("dgrad_gradient", "wgrad_gradient"),
    "weight": ("dgrad_weight",),
    "input": ("wgrad_input",),
    "dgrad": ("dgrad_gradient", "dgrad_weight"),
    "wgrad": ("wgrad_gradient", "wgrad_input"),
    "dgrad.gradient": ("dgrad_gradient",),
    "dgrad.weight": ("dgrad_weight",),
    "wgrad.gradient": ("wgrad_gradient",),
    "wgrad.input": ("wgrad_input",),
}
GRADIENT_FORMS = ("fp8-e4m3", *FORMS)
GRADIENT_NAMES = (
    f"NAME+gradX, X the bits (2 to 16) or {', '.join(GRADIENT_FORMS)}; then -tensor, -nearest or -stochastic; then "
    f":OPERAND,... of {', '.join(OPERAND_NAMES)}"
)
PART = re.compile(
    rf"([0-9]{{1,4}}|{'|'.join(sorted(GRADIENT_FORMS, key=len, reverse=True))})((?:-[a-z]+)*)(?::([a-z.,]*))?"
)


def quantize_matmuls(form: str, spec: ModelSpec) -> Recipe:
    """The recipe `train-<form>`: both operands of every matmul, dynamic and symmetric. A scale per token, or per output
    channel of a weight; with `-tensor` one each. MX: blocks of 32 along the summed axis where it is the last one and 32
    divides it, elsewhere (the product of probabilities and values) as fp8.

    Raises SpecError for what is none of these forms, and for bits that no quantizer has.
    """
    base, tensor = form.removesuffix("-tensor"), form.endswith("-tensor")
    rows, channels = (Granularity.TENSOR,) * 2 if tensor else (Granularity.TOKEN, Granularity.CHANNEL)
    first: Quant
    second: Quant
    special: tuple[Rule, ...] = ()
    source, weights_source = (ONE, ONE) if tensor else (SOURCE, CHANNELS)
    if match := re.fullmatch(r"w([0-9]{1,4})a([0-9]{1,4})", base):
        first = QuantSpec(bits=int(match[2]), symmetric=True, granularity=rows, dynamic=True)
        second = QuantSpec(bits=int(match[1]), symmetric=True, granularity=channels, dynamic=True)
    elif base in FP8 or (base in MX and not tensor):
        kind = FP8.get(base) or MX[base]
        first = FloatQuantSpec(kind, granularity=rows, dynamic=True)
        second = FloatQuantSpec(kind, granularity=channels, dynamic=True)
        special = split_blocks(kind, first, second, spec) if base in MX else ()
    else:
        raise SpecError(f"recipe 'train-{form}' is not known: choose {NAMES}")
    rules = (
        Rule(OPERANDS, first, source),
        Rule(("*.weight",), second, weights_source),
        *special,
        Rule(("*norm.weight", *TABLES), None, "not an operand of a matmul"),
    )
    return Recipe(f"train-{form}", rules)


def split_blocks(kind: FloatFormat, rows: Quant, channels: Quant, spec: ModelSpec) -> tuple[Rule, ...]:
    """MX blocks where they fit; where they do not, what stood there before."""
    blocks = FloatQuantSpec(kind, granularity=Granularity.BLOCK, dynamic=True, block=MX_BLOCK)
    undivided = [site for site, (_, last) in extents(spec).items() if last % MX_BLOCK]
    why = f"the last axis has no whole number of blocks of {MX_BLOCK}"
    weights = tuple(site for site in undivided if site.endswith(".weight"))
    operands = tuple(site for site in undivided if site.endswith((".input", ".scores.lhs", ".scores.rhs")))
    return (
        Rule(("*.input", "*.weight", "*.scores.lhs", "*.scores.rhs"), blocks, MX_TEXT),
        *([Rule(operands, rows, why)] if operands else []),
        *([Rule(weights, channels, why)] if weights else []),
    )


def read_gradients(text: str) -> Gradients:
    """What follows a recipe's name at its first `+grad`: `8`, `fp8:gradient+grad8:weight,input`, ...

    Of an operand that is named twice the last holds. Gradients are rounded stochastically, weights and inputs to
    nearest, unless said otherwise.

    Raises SpecError naming the part that does not read, and what is known.
    """
    operands: dict[str, Operand] = {}
    for part in text.split("+grad"):
        match = PART.fullmatch(part)
        more = [] if match is None else match[2].split("-")[1:]
        chosen = ["dgrad", "wgrad"] if match is None or match[3] is None else match[3].split(",")
        modes = {"tensor", "nearest", "stochastic"}
        if (
            match is None
            or not modes >= set(more)
            or len({*more} - {"tensor"}) > 1
            or not set(chosen) <= {*OPERAND_NAMES}
        ):
            raise SpecError(f"gradients '+grad{part}' are not known: choose {GRADIENT_NAMES}")
        for name in (name for group in chosen for name in OPERAND_NAMES[group]):
            of_gradient = name.endswith("gradient")
            stochastic = (of_gradient or "stochastic" in more) and "nearest" not in more
            operands[name] = Operand(make_operand(match[1], of_gradient, "tensor" in more), stochastic)
    return Gradients(**operands)


def make_operand(form: str, of_gradient: bool, tensor: bool) -> Quant:
    """The quantizer of an operand by the name of its form. `fp8` is e5m2 for gradients and e4m3 for the rest. Raises
    SpecError for bits that no quantizer has, and for MX blocks with one scale per tensor."""
    granularity = Granularity.TENSOR if tensor else Granularity.TOKEN
    if form.isdigit():
        return QuantSpec(bits=int(form), symmetric=True, granularity=granularity, dynamic=True)
    if form in MX:
        if tensor:
            raise SpecError(f"gradients of {form} have a scale per block of {MX_BLOCK}: leave -tensor out")
        return FloatQuantSpec(MX[form], granularity=Granularity.BLOCK, dynamic=True, block=MX_BLOCK)
    wide = form == "fp8-e5m2" or (form == "fp8" and of_gradient)
    return FloatQuantSpec(FloatFormat.E5M2 if wide else FloatFormat.E4M3, granularity=granularity, dynamic=True)


def add_gradients(chosen: Recipe, text: str) -> Recipe:
    """The recipe with the gradients that `text` says. Raises SpecError as `read_gradients`."""
    return replace(chosen, name=f"{chosen.name}+grad{text}", gradients=read_gradients(text))
