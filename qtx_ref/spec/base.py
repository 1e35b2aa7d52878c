"""What every spec is made of: errors, named values, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from enum import Enum
from numbers import Integral, Real
from typing import Any, NoReturn

__all__ = [
    "Name",
    "Spec",
    "SpecError",
    "field_types",
    "from_dict",
    "from_object",
    "is_finite",
    "is_number",
    "refuse",
    "required_keys",
    "settle",
    "to_dict",
]


class SpecError(ValueError):
    """A value that no model, quantizer or recipe can have. The message names it and the remedy."""


class Name(str, Enum):
    """An enum that prints and serializes as its value."""

    def __str__(self) -> str:
        return self.value


def refuse(what: str, value: Any, remedy: str) -> NoReturn:
    """Raises SpecError: `what` is `value`, written in 200 characters at most, and the remedy."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        text = f"a number of {value.bit_length()} bits"
    text = text if len(text) <= 200 else f"{text[:200]}..."
    raise SpecError(f"{what} is {text}: {remedy}")


def is_number(value: Any) -> bool:
    """Whether it is a finite int or float of Python; a bool is not."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value == value
        and abs(value) != float("inf")
    )


def settle(kind: Any, value: Any, what: str, otherwise: str = "") -> Any:
    """`value` as a field of type `kind` holds it. Raises SpecError naming `what`, the value and what is accepted.

    An enum's member or its value becomes the member; a number of NumPy, Python's own; a whole number given for a float,
    a float; a list, a tuple. A bool is no number, and a string no tuple of strings. `otherwise`: what else is accepted.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = tuple(one for one in arguments if one is not types.NoneType)
        otherwise = " or None" if types.NoneType in arguments else ""
        if (value is None and otherwise) or (kinds[1:] and isinstance(value, kinds)):
            return value
        if kinds[1:]:
            refuse(what, value, f"expected {' or '.join(one.__name__ for one in kinds)}{otherwise}")
        return settle(kinds[0], value, what, otherwise)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            refuse(what, value, f"expected a tuple of {arguments[0].__name__}{otherwise}")
        return tuple(settle(arguments[0], item, f"{what}[{i}]") for i, item in enumerate(value))
    if getattr(value, "shape", None) == ():  # a scalar of NumPy
        value = value.item()
    if issubclass(kind, Enum):
        if isinstance(value, str) and (isinstance(value, kind) or not isinstance(value, Enum)):
            for member in kind:
                if value == member:
                    return member
        refuse(what, value, f"known values are {', '.join(str(member) for member in kind)}{otherwise}")
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if kind is float and isinstance(value, Real) and not isinstance(value, bool) and is_finite(value):
        return float(value)
    if kind is str and isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        refuse(what, value, "half a surrogate pair is no character")
    if kind not in (int, float) and isinstance(value, kind) and not isinstance(value, Enum):
        return value
    accepted = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}
    refuse(what, value, f"expected {accepted.get(kind, kind.__name__)}{otherwise}")


def is_finite(value: Real) -> bool:
    """Whether a float64 holds it, as neither infinity nor NaN."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


@functools.cache
def field_types(kind: Any) -> dict[str, Any]:
    """What each field of a spec may hold, its strings of annotations evaluated."""
    return typing.get_type_hints(kind)


class Spec:
    """What every spec class is: each field holds what its annotation says, however the spec was made (positions, names,
    `dataclasses.replace`, `from_dict`), and `check` has passed."""

    def __post_init__(self) -> None:
        own: Any = type(self)
        for name, kind in field_types(own).items():
            value = settle(kind, getattr(self, name), f"{own.__name__} {name}")
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Raises SpecError where fields have values that the spec cannot have, alone or together."""


def to_dict(spec: Any) -> Any:
    """A spec as plain JSON values."""
    if dataclasses.is_dataclass(spec):
        return {field.name: to_dict(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
    if isinstance(spec, Enum):
        return spec.value
    if isinstance(spec, tuple):
        return [to_dict(item) for item in spec]
    return spec


def required_keys(kind: Any) -> list[str]:
    """Keys without a default."""
    return [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]


def from_object(kind: Any, data: Any, where: str) -> Any:
    """`from_dict` of a spec class, whose fields are the keys. Raises SpecError as it does."""
    if not isinstance(data, dict):
        refuse(where, data, "expected an object with keys")
    hints = field_types(kind)
    for key in data:
        if key not in hints:
            refuse(f"unknown key in {where}", key, f"known keys are {', '.join(hints)}")
    for key in required_keys(kind):
        if key not in data:
            refuse(f"missing key in {where}", key, "add it")
    return kind(**{key: from_dict(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def from_dict(kind: Any, data: Any, where: str = "") -> Any:
    """The spec of type `kind` that `to_dict` wrote. Unknown keys, missing keys and wrong types raise `SpecError`."""
    where = where or getattr(kind, "__name__", str(kind))
    if dataclasses.is_dataclass(kind):
        return from_object(kind, data, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        if kinds[1:]:  # of several, the one whose required keys are there
            given = set(data) if isinstance(data, dict) else set()
            kinds.sort(key=lambda one: len(given & set(required_keys(one))), reverse=True)
        return from_dict(kinds[0], data, where)
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            refuse(where, data, "expected a list")
        return tuple(from_dict(arguments[0], item, where) for item in data)
    return settle(kind, data, where)
