"""What every spec is made of: errors, named values, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import Enum
from typing import Any


class SpecError(ValueError):
    """A value that no model, quantizer or recipe can have. The message names it and the remedy."""


class Name(str, Enum):
    """An enum that prints and serializes as its value."""

    def __str__(self) -> str:
        return self.value


def refuse(what: str, value: Any, remedy: str) -> None:
    raise SpecError(f"{what} is {value!r}: {remedy}")


def is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value == value
        and abs(value) != float("inf")
    )


def to_dict(spec: Any) -> Any:
    """A spec as plain JSON values."""
    if dataclasses.is_dataclass(spec):
        return {field.name: to_dict(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
    if isinstance(spec, Enum):
        return spec.value
    if isinstance(spec, tuple):
        return [to_dict(item) for item in spec]
    return spec


def required(kind: Any) -> list[str]:
    """Keys without a default."""
    return [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]


def from_dict(kind: Any, data: Any, where: str = "") -> Any:
    """The spec of type `kind` that `to_dict` wrote. Unknown keys, missing keys and wrong types raise `SpecError`."""
    where = where or getattr(kind, "__name__", str(kind))
    if dataclasses.is_dataclass(kind):
        if not isinstance(data, dict):
            refuse(where, data, "expected an object with keys")
        hints = typing.get_type_hints(kind)
        for key in data:
            if key not in hints:
                refuse(f"unknown key in {where}", key, f"known keys are {', '.join(hints)}")
        for key in required(kind):
            if key not in data:
                refuse(f"missing key in {where}", key, "add it")
        return kind(**{key: from_dict(hints[key], value, f"{where}.{key}") for key, value in data.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        if kinds[1:]:  # of several, the one whose required keys are there
            given = set(data) if isinstance(data, dict) else set()
            kinds.sort(key=lambda one: len(given & set(required(one))), reverse=True)
        return from_dict(kinds[0], data, where)
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            refuse(where, data, "expected a list")
        return tuple(from_dict(arguments[0], item, where) for item in data)
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(data)
        except ValueError:
            refuse(where, data, f"known values are {', '.join(str(member) for member in kind)}")
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        refuse(where, data, f"expected {kind.__name__}")
    return data
