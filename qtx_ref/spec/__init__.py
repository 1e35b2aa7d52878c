"""The vocabulary of qtx: what a model, an attention, a quantizer, a recipe and an optimizer *are*, as data.

Standard library only; both backends read it and it does no arithmetic on tensors. Everything is frozen, checked when
it is made, and travels as JSON (`to_dict`, `from_dict`). A wrong value raises `SpecError`, one line that names the
value and what would be accepted.
"""

from __future__ import annotations

from .base import Name, Spec, SpecError, from_dict, to_dict
from .formats import FloatFormat, SharedScale
from .gradients import Gradients, Operand
from .inputs import (
    MASKS,
    READ,
    check_batch,
    check_generation,
    check_marks,
    check_tokens,
    check_where,
)
from .limits import accumulator_bits, check_integer, check_width, refuse_integer
from .model import (
    Activation,
    AttentionSpec,
    Family,
    Gate,
    Head,
    ModelSpec,
    Softmax,
    Start,
)
from .optim import OptimSpec, Schedule, decays, trains
from .processes import read_processes
from .profile import (
    QTX,
    Dtype,
    InfinityPolicy,
    NanPolicy,
    Nonlinear,
    Nudging,
    Overflow,
    Profile,
    Requantization,
    Rounding,
    ScaleRule,
)
from .quant import (
    FloatQuantSpec,
    Granularity,
    ObserverKind,
    ObserverSpec,
    Output,
    Quant,
    QuantSpec,
    Range,
    check_axes,
    range_axes,
)
from .recipe import InputTransform, Recipe, Rewrite, Rule, Transform, TransformKind
from .statistics import BINS, DROPPED, MOMENTS, SIGMAS, STATISTICS
from .step import PLAIN_STEP, Sharding, StepSpec, check_rows, divide_rows

__all__ = [
    "Activation",
    "AttentionSpec",
    "BINS",
    "DROPPED",
    "Dtype",
    "Family",
    "FloatFormat",
    "FloatQuantSpec",
    "Gate",
    "Gradients",
    "Granularity",
    "Head",
    "InfinityPolicy",
    "InputTransform",
    "MASKS",
    "MOMENTS",
    "ModelSpec",
    "Name",
    "NanPolicy",
    "Nonlinear",
    "Nudging",
    "ObserverKind",
    "ObserverSpec",
    "Operand",
    "OptimSpec",
    "Output",
    "Overflow",
    "PLAIN_STEP",
    "Profile",
    "QTX",
    "Quant",
    "QuantSpec",
    "READ",
    "Range",
    "Recipe",
    "Requantization",
    "Rewrite",
    "Rounding",
    "Rule",
    "SIGMAS",
    "STATISTICS",
    "ScaleRule",
    "Schedule",
    "Sharding",
    "SharedScale",
    "Softmax",
    "Spec",
    "SpecError",
    "Start",
    "StepSpec",
    "Transform",
    "TransformKind",
    "accumulator_bits",
    "check_axes",
    "check_batch",
    "check_generation",
    "check_integer",
    "check_marks",
    "check_rows",
    "check_tokens",
    "check_where",
    "check_width",
    "decays",
    "divide_rows",
    "from_dict",
    "range_axes",
    "read_processes",
    "refuse_integer",
    "to_dict",
    "trains",
]
