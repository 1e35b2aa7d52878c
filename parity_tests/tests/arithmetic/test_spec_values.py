"""A spec holds what its annotations say, however it was made; anything else is refused by name."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from enum import Enum

import numpy as np
import pytest

from qtx_ref import spec as vocabulary
from qtx_ref.spec import (
    ONE_ROUNDING,
    QTX,
    Activation,
    AttentionSpec,
    Family,
    FloatFormat,
    FloatProduct,
    FloatQuantSpec,
    Gate,
    Gradients,
    Granularity,
    Head,
    ModelSpec,
    ObserverKind,
    ObserverSpec,
    Operand,
    OptimSpec,
    Profile,
    QuantSpec,
    Recipe,
    Rewrite,
    Rounding,
    Rule,
    Schedule,
    SharedScale,
    Softmax,
    SpecError,
    StepSpec,
    Transform,
    TransformKind,
    from_dict,
    to_dict,
)
from qtx_ref.spec.base import Spec

MODEL = ModelSpec(Family.BERT, 1, 8, 2, 16, Head.MLM, vocab=10, length=4)
RULE = Rule(("*.weight",), QuantSpec(), "a test")
OPERAND = Operand(QuantSpec(symmetric=True, granularity=Granularity.TOKEN, dynamic=True), stochastic=True)
SPECS = [
    AttentionSpec(Softmax.CLIPPED_ROW, alpha=2.0),
    MODEL,
    ObserverSpec(),
    QuantSpec(outliers=6.0, granularity=Granularity.TOKEN, dynamic=True),
    FloatQuantSpec(FloatFormat.E4M3, granularity=Granularity.BLOCK, dynamic=True),
    RULE,
    Transform(("*",), TransformKind.SMOOTH, "a test", strength=0.5),
    Recipe("a test", (RULE,)),
    OPERAND,
    Gradients(dgrad_gradient=OPERAND),
    OptimSpec(only=("head",)),
    StepSpec(),
    QTX,
    QTX.scale,
    QTX.quantize,
    QTX.fake_quantize,
    QTX.dequantize,
    QTX.matmul,
    ONE_ROUNDING,
    FloatProduct("float32", "ratio", "after", "half_even", "saturate"),
    QTX.add,
    QTX.cast,
]
FIELDS = [(spec, field.name) for spec in SPECS for field in dataclasses.fields(spec)]


def kinds(spec: Spec, name: str) -> set[object]:
    """The types of a field, without its tuple and its None."""
    kind = typing.get_type_hints(type(spec))[name]
    arguments = typing.get_args(kind)
    return {a for a in arguments if a not in (type(None), Ellipsis)} if arguments else {kind}


def test_every_spec_class_is_here_and_checks_in_one_way():
    classes = {c for c in vars(vocabulary).values() if inspect.isclass(c) and dataclasses.is_dataclass(c)}
    assert classes == {type(spec) for spec in SPECS}
    for one in classes:
        assert issubclass(one, Spec) and "__post_init__" not in vars(one)


@pytest.mark.parametrize("spec, name", FIELDS)
def test_plain_values_become_the_spec_s_own(spec, name):
    """A member's value, a list and NumPy's scalars give an equal spec of the same types."""
    value = getattr(spec, name)
    if isinstance(value, Enum):
        given = [value.value, np.str_(value.value)]
    elif isinstance(value, bool):
        given = [np.bool_(value)]
    elif isinstance(value, int):
        given = [np.int64(value), np.uint16(value), np.array(value)]
    elif isinstance(value, float):
        given = [np.float64(value)] + [int(value)] * (value == int(value))
        given += [np.float32(value)] if float(np.float32(value)) == value else []
    elif isinstance(value, tuple):
        given = [list(value)]
    else:
        given = [value]
    for one in given:
        again = dataclasses.replace(spec, **{name: one})
        assert again == spec
        assert type(getattr(again, name)) is type(value)
        json.dumps(to_dict(again))


@pytest.mark.parametrize("spec, name", FIELDS)
def test_anything_else_is_refused_by_name(spec, name):
    wrong = [object(), {}, b"tensor", 1j, np.zeros(2)]
    if Spec not in {base for kind in kinds(spec, name) for base in getattr(kind, "__mro__", ())}:
        wrong.append(ObserverSpec())
    if str not in kinds(spec, name) or isinstance(getattr(spec, name), tuple):
        wrong += ["no such value", ""]
    if int not in kinds(spec, name):
        wrong.append(Rounding.FLOOR if name not in ("rounding", "zero_point_rounding") else Head.NONE)
    if kinds(spec, name) & {int, float}:
        wrong += [True, np.bool_(False), float("nan"), np.float32("inf"), "1"]
    if int in kinds(spec, name):
        wrong += [1.0, np.float64(2)]
    if float in kinds(spec, name):
        wrong.append(10**400)
    if bool in kinds(spec, name):
        optional = type(None) in typing.get_args(typing.get_type_hints(type(spec))[name])
        wrong += [0, 1, "true"] + [None] * (not optional)
    if isinstance(getattr(spec, name), tuple):
        wrong += [None, (object(),), {"a"}, (None,)]
    for value in wrong:
        with pytest.raises(SpecError, match=rf"^{type(spec).__name__} {name}(\[0\])? is ") as error:
            dataclasses.replace(spec, **{name: value})
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_strings_are_the_members_they_name():
    """Before, a string passed every `is` as if it were none of the members."""
    assert QuantSpec(granularity="tensor") == QuantSpec()
    assert QuantSpec(granularity="tensor").granularity is Granularity.TENSOR
    assert dataclasses.replace(QTX.quantize, rounding="half_away").rounding is Rounding.HALF_AWAY
    assert ModelSpec("bert", np.int64(1), 8, 2, 16, "mlm", vocab=10, length=4) == MODEL
    assert AttentionSpec("clipped", gate="linear", alpha=4).gate is Gate.LINEAR
    assert dataclasses.replace(MODEL, activation="relu").activation is Activation.RELU
    assert ObserverSpec("mse_grid").kind is ObserverKind.MSE_GRID
    assert FloatQuantSpec("e4m3", True, "block", True, shared="ceil").shared is SharedScale.CEIL
    assert OptimSpec(schedule="cosine").schedule is Schedule.COSINE
    assert Recipe("a", [RULE], rewrite="gptq") == Recipe("a", (RULE,), rewrite=Rewrite.GPTQ)


def test_a_string_is_no_tuple_of_patterns():
    """`*` alone, the first letter of the pattern, matches every site."""
    with pytest.raises(SpecError, match=r"^Rule sites is '\*\.weight': expected a tuple of str$"):
        Rule("*.weight", QuantSpec(), "a test")
    with pytest.raises(SpecError, match="^Transform sites is "):
        Transform("*.hidden", "hadamard", "a test")
    with pytest.raises(SpecError, match="^OptimSpec only is "):
        OptimSpec(only="head")


def test_a_member_of_another_enum_is_refused_though_its_value_is_the_same():
    with pytest.raises(SpecError, match="AttentionSpec gate is"):
        AttentionSpec(gate=Head.NONE)


def test_arithmetic_takes_no_string_for_another_member(call):
    """`round_dtype(x, "float32")` rounded to bfloat16, and a rule of shared scales was the floor."""
    x, words = np.ones(32, np.float32), np.zeros(32, np.uint32)
    with pytest.raises(ValueError, match="rounding is 'half_even': give a Rounding"):
        call("quant.rounding.round_integer", x, "half_even", words)
    with pytest.raises(ValueError, match="dtype is 'float32': give a Dtype"):
        call("quant.rounding.round_dtype", x, "float32")
    with pytest.raises(ValueError, match="rule is 'ceil': give a SharedScale"):
        call("quant.formats.mx_exponent", x, FloatFormat.E4M3, "ceil", 32)


def test_a_value_too_long_to_print_is_still_one_line():
    with pytest.raises(SpecError, match="a number of 16610 bits: give a whole number from 2 to 16"):
        QuantSpec(bits=10**5000)


def test_from_dict_accepts_and_refuses_the_same():
    assert from_dict(QuantSpec, {"bits": np.int64(4), "observer": {"margin": 1}}).observer.margin == 1.0
    assert from_dict(Profile, to_dict(QTX)) == QTX
    for data, where in [
        ({"bits": 4.0}, "QuantSpec.bits"),
        ({"granularity": "tensr"}, "QuantSpec.granularity"),
        ({"observer": {"margin": float("nan")}}, "QuantSpec.observer.margin"),
        ({"symmetric": 1}, "QuantSpec.symmetric"),
    ]:
        with pytest.raises(SpecError, match=f"^{where} is "):
            from_dict(QuantSpec, data)
