"""A run as its file, the bundled ones and options say it: read, laid over one another, and written."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any

from qtx_ref.spec import SpecError
from qtx_ref.spec.base import refuse

from .. import __version__
from ..data.reading import read_regular
from ..files.formats import RUN_MARK
from .keys import LONGEST, NOTHING, Key, find_key, list_keys, nearest, read_value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUFFIX = ".toml"
STUDY = "study"  # the table of grids
BASE = "base"  # the bundled run that a file changes
LARGEST = 2**20  # bytes of a file


@dataclass(frozen=True)
class Setting:
    """A value of a key, and who said it: a bundled run, a file, an option."""

    value: Any
    origin: str


@dataclass(frozen=True)
class RunSpec:
    """A run as far as something is said of it; all else is as it was before there were runs as files.

    settings: by key, as the specs' fields hold them. grids: for a study, the values of each key that varies.
    """

    settings: Mapping[str, Setting] = field(default_factory=dict)
    grids: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def get(self, name: str, otherwise: Any = None) -> Any:
        """What is said of a key, or `otherwise`."""
        return self.settings[name].value if name in self.settings else otherwise

    def table(self, name: str) -> dict[str, Any]:
        """What is said of the keys of a table, by their names in it."""
        return {key.removeprefix(f"{name}."): one.value for key, one in self.settings.items() if in_table(key, name)}

    def under(self, other: RunSpec) -> RunSpec:
        """This run, and over it what another says, a value over a grid too. Another preset is another model: of this
        one's the attention stays, and no other key of its shape."""
        own, name = self.settings, other.get("model.preset")
        if name not in (None, self.get("model.preset", name)):
            own = {key: one for key, one in own.items() if not in_table(key, "model") or key == "model.attention"}
        grids = {key: values for key, values in self.grids.items() if key not in other.settings}
        return RunSpec({**own, **other.settings}, {**grids, **other.grids})

    def at(self, point: Mapping[str, Any]) -> RunSpec:
        """The run at one point of its grids."""
        return RunSpec({**self.settings, **{name: Setting(value, STUDY) for name, value in point.items()}})

    def only(self, allowed: Sequence[str]) -> RunSpec:
        """Of what is said, these keys and tables."""
        return RunSpec({name: one for name, one in self.settings.items() if is_among(name, allowed)})

    def refuse(self, allowed: Sequence[str], why: str) -> None:
        """Raises SpecError for a key that is neither among `allowed` nor in a table of it."""
        for name, setting in self.settings.items():
            if not is_among(name, allowed):
                raise SpecError(f"{setting.origin}: {name} is {write_value(setting.value)}: {why}")


def in_table(name: str, table: str) -> bool:
    """Whether a key is of a table."""
    return name.startswith(f"{table}.")


def is_among(name: str, allowed: Sequence[str]) -> bool:
    """Whether a key is one of these, or in one of these tables."""
    return any(name == one or in_table(name, one) for one in allowed)


def make_run(values: Mapping[str, Any], origin: str = "here", grids: Mapping[str, Any] | None = None) -> RunSpec:
    """A run that says `values`, by key as TOML has them: `{"optim.steps": 100, "model.attention": "clipped"}`.

    Raises SpecError for a key that there is not, naming the nearest one, and a value that it cannot have.
    """
    settings = {name: Setting(read_value(find_key(name, origin), one, origin), origin) for name, one in values.items()}
    return RunSpec(settings, {name: read_grid(name, given, origin) for name, given in (grids or {}).items()})


def read_grid(name: str, given: Any, origin: str) -> tuple[Any, ...]:
    """The values of a key that varies. Raises SpecError for none, or one twice."""
    key = find_key(name, origin)
    values = tuple(
        read_value(key, one, origin) for one in (given if isinstance(given, (list, tuple, range)) else [given])
    )
    if not values or any(one in values[:i] for i, one in enumerate(values)):
        refuse(f"{origin}: {STUDY}.{name}", given, "name at least one, each once")
    return values


# --- files ------------------------------------------------------------------------------------------------------------


def list_bundled() -> list[str]:
    """The names of the runs that come with qtx."""
    folder = resources.files(__package__)
    return sorted(one.name.removesuffix(SUFFIX) for one in folder.iterdir() if one.name.endswith(SUFFIX))


def read_bundled(name: str) -> str:
    """The text of a bundled run. Raises SpecError naming the nearest one that there is."""
    known = list_bundled()
    if name not in known:
        raise SpecError(f"unknown run {name!r}: did you mean {nearest(name, known)}? qtx runs lists them")
    return resources.files(__package__).joinpath(name + SUFFIX).read_text(encoding="utf-8")


def open_run(name: str) -> RunSpec:
    """A bundled run, or that of a file.

    Raises SpecError for a name that is neither, a file that cannot be read or is no TOML, and what is wrong in it.
    """
    if name in list_bundled() or not (name.endswith(SUFFIX) or Path(name).exists()):
        return parse_run(read_bundled(name), name)
    try:
        text = read_regular(Path(name), LARGEST).decode("utf-8-sig")  # editors of Windows put a mark in front
    except OSError as error:
        raise SpecError(f"run {name} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise SpecError(f"run {name} is no text in UTF-8") from None
    return parse_run(text, name)


def parse_run(text: str, source: str) -> RunSpec:
    """The run that a text in TOML says; `source` names it in errors and beside its values."""
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"run {source} is no TOML: {error}") from None
    base = content.pop(BASE, None)
    if base is not None and base not in list_bundled():
        refuse(f"{source}: {BASE}", base, f"name one of {', '.join(list_bundled())}")
    grids = content.pop(STUDY, {})
    if not isinstance(grids, dict):
        refuse(f"{source}: {STUDY}", grids, "expected a table of lists, a key each")
    run = make_run(flatten(content, "", source), source, flatten(grids, "", source))
    return run if base is None else open_run(base).under(run)


def flatten(content: Mapping[str, Any], table: str, source: str) -> dict[str, Any]:
    """The values of nested tables by the whole names of their keys. Raises SpecError for a name that is no key."""
    values: dict[str, Any] = {}
    for name, value in content.items():
        whole = f"{table}.{name}" if table else name
        is_table = any(in_table(key, whole) for key in list_keys())
        if is_table and isinstance(value, dict):
            values |= flatten(value, whole, source)
        elif is_table and whole not in list_keys():
            refuse(f"{source}: {whole}", value, f"expected a table, [{whole}]")
        elif isinstance(value, dict) and whole not in list_keys():
            tables = dict.fromkeys(key.table for key in list_keys().values() if key.table)
            raise SpecError(f"{source}: unknown table [{whole[:LONGEST]}]: did you mean [{nearest(whole, tables)}]?")
        else:
            values[find_key(whole, source).name] = value
    return values


def parse_setting(text: str) -> RunSpec:
    """What an option such as `optim.lr=1e-4` says: the value is as in TOML, or a text without quotes.

    Raises SpecError as `make_run`.
    """
    origin = f"--set {text}"
    name, equals, given = (part.strip() for part in text.partition("="))
    if not equals or not name:
        raise SpecError(f"{origin}: expected KEY=VALUE")
    return make_run({name: parse_value(find_key(name, origin), given)}, "--set")


def parse_value(key: Key, text: str) -> Any:
    """A value of the command line; where the key takes text alone, the text as it is."""
    if text in ("True", "False"):
        return text == "True"
    try:
        content = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    plain = key.kind is str and not isinstance(content["value"], str)
    return text if plain or set(content) != {"value"} else content["value"]


# --- writing ----------------------------------------------------------------------------------------------------------


def write_value(value: Any) -> str:
    """A value as TOML has it, on one line."""
    if value is None:
        return f'"{NOTHING}"'
    if isinstance(value, Enum):
        return json.dumps(value.value)
    if isinstance(value, (bool, int)):
        return str(value).lower()
    if isinstance(value, float):
        text = repr(value)
        return text if "e" not in text or "." in text else text.replace("e", ".0e")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(write_value, value))}]"
    if is_dataclass(value):
        inner = ", ".join(f"{one.name} = {write_value(getattr(value, one.name))}" for one in fields(value))
        return f"{{ {inner} }}"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def write_run(settings: Mapping[str, Setting], grids: Mapping[str, tuple[Any, ...]] | None = None) -> str:
    """A run as a file: every value with who said it beside it; and a study's values of what varies."""
    lines, table = [f"{RUN_MARK.decode()} {__version__}: each value with who said it"], ""
    for name in list_keys():
        if name not in settings:
            continue
        place, _, last = name.rpartition(".")
        if place != table:
            lines, table = [*lines, "", f"[{place}]"], place
        origin = settings[name].origin  # a file's name may hold what no comment may
        lines.append(
            f"{last} = {write_value(settings[name].value)}  # {origin if origin.isprintable() else ascii(origin)}"
        )
    if grids:
        lines += ["", f"[{STUDY}]", *(f"{name} = {write_value(values)}" for name, values in grids.items())]
    return "\n".join(lines) + "\n"
