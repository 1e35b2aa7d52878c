"""Profiles that differ from one in little: what two executions may differ in, the smallest differences first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from itertools import combinations
from typing import Any

from qtx_ref.profiles import NAMES, profile
from qtx_ref.spec import Bias, Fixed, Products, Profile, SpecError, to_dict
from qtx_ref.spec.base import field_types

__all__ = ["EXECUTED", "differing_fields", "list_levels", "take_fields"]

EXECUTED = (
    "quantize",
    "dequantize",
    "fake_quantize",
    "matmul",
    "bias",
    "requantize",
    "add",
)  # operations of a model in integers
NUMBERS = {"bits": (15, 31), "run": (1, 2, 4, 8)}


def flatten(record: Any, name: str) -> dict[str, Any]:
    """A record's fields by path."""
    if not is_dataclass(record):
        return {name: to_dict(record)}
    made = {name: type(record).__name__} if name == "requantize" else {}
    for field in fields(record):
        made |= flatten(getattr(record, field.name), f"{name}.{field.name}")
    return made


def differing_fields(a: Profile, b: Profile) -> dict[str, tuple[Any, Any]]:
    """The fields of executed operations in which two profiles differ, by path; None for one that a record lacks."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in EXECUTED:
        one, other = (flatten(getattr(p, name), name) for p in (a, b))
        for key in dict.fromkeys((*one, *other)):
            if one.get(key) != other.get(key):
                found[key] = one.get(key), other.get(key)
    return found


def take_fields(base: Profile, other: Profile, keys: Sequence[str]) -> Profile | None:
    """The profile with some fields of another, by path; a requantization of another kind is taken whole. None where no
    profile has them together."""
    made: Profile | None = base
    for name in EXECUTED:
        some = [key.partition(".")[2] for key in keys if key.partition(".")[0] == name]
        if not some or made is None:
            continue
        record = getattr(other, name)
        if not is_dataclass(record) or type(record) is not type(getattr(base, name)):
            made = put(made, name, record)
        else:
            made = change(made, name, {key: read_path(record, key) for key in some})
    return made


def list_values(kind: Any, name: str) -> tuple[Any, ...]:
    """What a field may hold."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return tuple(kind)
    return (False, True) if kind is bool else NUMBERS.get(name, ())


def list_changes(record: Any) -> Iterator[tuple[str, Any]]:
    """Each field of a record with each other value that it may have."""
    kind: Any = type(record)
    hints = field_types(kind)
    for field in fields(record):
        old = getattr(record, field.name)
        if is_dataclass(old):
            yield from ((f"{field.name}.{key}", value) for key, value in list_changes(old))
        yield from ((field.name, value) for value in list_values(hints[field.name], field.name) if value != old)


def change(base: Profile, name: str, changes: dict[str, Any]) -> Profile | None:
    """The profile with other values in one record; None where no profile has them."""
    record = getattr(base, name)
    if name == "matmul" and "products" in changes:  # a run belongs to runs alone
        changes = {"run": 2 if changes["products"] is Products.RUNS16 else 1} | changes
    try:
        return replace(base, **{name: alter(record, changes)})
    except SpecError:
        return None


def alter(record: Any, changes: Mapping[str, Any]) -> Any:
    """A record with other values in some fields, by path. Raises SpecError where no record has them together."""
    own = {key: value for key, value in changes.items() if "." not in key}
    for outer in {key.partition(".")[0] for key in changes if "." in key}:
        inner = {key.partition(".")[2]: value for key, value in changes.items() if key.startswith(f"{outer}.")}
        own[outer] = alter(getattr(record, outer), inner)
    return replace(record, **own)


def read_path(record: Any, path: str) -> Any:
    """A field of a record, by path."""
    for key in path.split("."):
        record = getattr(record, key)
    return record


def put(base: Profile, name: str, record: Any) -> Profile | None:
    """The profile with another record; None where no profile has it beside the others."""
    try:
        return replace(base, **{name: record})
    except SpecError:
        return None


def list_levels(base: Profile) -> Iterator[list[Profile]]:
    """The profile itself; with one field changed; with a whole record of another profile; with two fields of one record
    changed, of `Fixed` and float requantizations with any."""
    yield [base]
    single = [put(base, "bias", bias) for bias in Bias if bias is not base.bias]
    for name in EXECUTED:
        if name != "bias":
            single += [change(base, name, {key: value}) for key, value in list_changes(getattr(base, name))]
    yield list(filter(None, single))
    known = {getattr(profile(other), name): name for other in NAMES for name in EXECUTED}
    others = (put(base, name, record) for record, name in known.items() if record != getattr(base, name))
    yield list(filter(None, others))
    double = []
    for name in EXECUTED:
        if name == "bias":
            continue
        for (first, one), (second, other) in combinations(list_changes(getattr(base, name)), 2):
            if first != second and (made := change(base, name, {first: one, second: other})) is not None:
                double.append(made)
    yield double
    yield list(list_requantizations(base))


def list_requantizations(base: Profile) -> Iterator[Profile]:
    """Every record of the other kind of requantization, from one that a known profile has, by one and two fields."""
    seeds = {profile(name).requantize for name in NAMES}
    for seed in seeds:
        if isinstance(seed, Fixed) == isinstance(base.requantize, Fixed):
            continue
        start = put(base, "requantize", seed) or replace(base, bias=Bias.INT32, requantize=seed)
        changes = list(list_changes(seed))
        for some in (*([one] for one in changes), *map(list, combinations(changes, 2))):
            made = change(start, "requantize", dict(some))
            if made is not None:
                yield made
