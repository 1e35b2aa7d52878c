"""The keys of a run: every field of its specs by a name with dots, what a value may be, and the nearest of a wrong one.

A spec's field is a key as soon as it is there; the comment beside it is what `qtx runs --keys` says of it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from qtx_ref.presets import attention, preset
from qtx_ref.spec import AttentionSpec, ModelSpec, OptimSpec, Spec, SpecError, StepSpec
from qtx_ref.spec.base import field_types, refuse, settle

from ..data.spec import Begin, DataSpec
from ..engines.machine import Machine
from .spec import EvaluationSpec, LogSpec, SavingSpec

NOTHING = "none"  # how a file says that an optional key has no value: TOML has no word for it
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
LARGEST = 2**63 - 1  # of whole numbers
LONGEST = 80  # characters of a wrong name that count
TABLES: dict[str, type] = {
    "model": ModelSpec,
    "optim": OptimSpec,
    "data": DataSpec,
    "step": StepSpec,
    "evaluation": EvaluationSpec,
    "saving": SavingSpec,
    "log": LogSpec,
    "machine": Machine,
}
FORMS = {  # of keys that also take a text with a unit
    "optim.warmup": 'steps, or a share of optim.steps such as "1%"',
    "saving.seconds": 'seconds, or a text such as "30 s", "10 min", "2 h"',
}


@dataclass(frozen=True)
class Key:
    """One thing that a run may say."""

    name: str  # with the table: optim.lr
    kind: Any  # of the value, as the field's annotation says it
    default: str  # in words
    told: str = ""  # its meaning, in a line; without, the comment beside the field
    least: int | None = None  # of a whole number that no spec checks
    spec: type | None = None  # whose field it is

    @property
    def table(self) -> str:
        """The name of its table; of a key at the top, nothing."""
        return self.name.rpartition(".")[0]

    @property
    def what(self) -> str:
        """Its meaning, in a line."""
        beside = read_comments(self.spec).get(self.name.rpartition(".")[2], "") if self.spec else ""
        return self.told or TOLD.get(self.name) or beside.replace("None: ", f"{NOTHING}: ")


# what a run has beside the fields of its specs, or where a default is more than the field's own
BESIDE = (
    Key("seed", int, "0", "of first values, batches, masks, dropout and stochastic rounding", 0),
    Key("init", str | None, NOTHING, "a checkpoint whose parameters the run begins with"),
    Key("stop", int | None, "optim.steps", "the last step, where it is not that of the schedule", 1),
    Key("model.preset", str, "opt-tiny", "the shape that the other keys of the table change; see qtx train --help"),
    Key("model.attention", str, "vanilla", "softmax and gate, as `clipped:gamma=-0.025+gated:pi=0.25`"),
    Key("optim.lr", float, "1e-3 for widths up to 256, else 1e-4", "peak learning rate"),
    Key("optim.warmup", int, "a tenth of optim.steps, at most 10,000", "steps from 0 to lr"),
    Key("optim.steps", int, "350", "steps of the whole schedule"),
    Key("data.batch", int, "16", "sequences or images per step, of all parts and processes together", 1),
    Key("data.window", int | None, "the model's length", "tokens of a training text, by which alpha divides"),
    Key("data.begin", Begin | None, "the family's", "what a beginning token stands in front of: of a BERT each window"),
    Key("quant.train", str | None, NOTHING, "recipe under which the model is trained: w8a8, lsq-w8a8, ..."),
    Key("quant.recipes", tuple[str, ...], "w8a8; of ptq its own list", "recipes that a study and ptq compare"),
)

# of fields that have no comment, or one for readers of the code
TOLD = {
    "model.family": "whose wiring it is",
    "model.layers": "number of blocks",
    "model.width": "of the hidden states",
    "model.heads": "of each attention; a divisor of the width",
    "model.hidden": "width within the FFN",
    "model.head": "what is made of the last hidden states",
    "model.activation": "within the FFN",
    "model.pre_norm": "norms before attention and FFN, not after",
    "model.final_norm": "a norm after the last block",
    "model.norm_eps": "of every LayerNorm",
    "model.init_std": "of normal first values",
    "model.start": "how first values are drawn: as the model's own paper says, or as the published code leaves them",
    "model.vocab": "entries of the token embedding, at least; of text",
    "model.length": "positions, the longest text; of images it follows",
    "model.embed_width": "of the token embedding, where it is projected in and out",
    "model.classes": "of a classifier",
    "model.channels": "of an image",
    "optim.beta1": "of AdamW",
    "optim.beta2": "of AdamW",
    "optim.eps": "of AdamW",
    "optim.weight_decay": "decoupled, of weights and tables",
    "optim.schedule": "what the rate does after the warm-up",
    "data.sources": "books, digits, backcopy, unigram, file, folder, hub:NAME; none: own; several: by weight",
    "data.order": "each step draws windows anew; or every window once per epoch, in an order of its own per epoch",
    "data.packing": "a window ends with its section or document; or documents are joined",
    "data.augment.brightness": "a factor drawn from 1 - x to 1 + x",
    "data.augment.contrast": "the same",
    "data.augment.saturation": "the same",
    "step.accumulate": "parts of a batch, one after another, whose gradients are summed",
    "step.int8": "linears of w8a8, w4a4, +grad8 by int8 products; on a CPU with VNNI, on CUDA; sums in another order",
    "step.sharding": "what each of several processes holds: the whole model, or its share",
    "log.tensorboard": "also in files for TensorBoard",
    "machine.backend": "torch, or ref (NumPy)",
    "machine.device": "cpu, cuda, or auto: cuda where there is one",
    "machine.dtype": "float32, float64; bfloat16, float16 with torch",
}


@functools.cache
def list_keys() -> dict[str, Key]:
    """Every key by its name: those at the top, then table by table."""
    keys = {key.name: key for key in BESIDE if not key.table}
    for table in ("model", "optim", "data", "quant", *TABLES):
        keys |= {key.name: key for key in BESIDE if key.table == table and key.name not in keys}
        keys |= {name: key for name, key in list_fields(table, TABLES.get(table)).items() if name not in keys}
    return keys


def list_fields(table: str, spec: type | None) -> dict[str, Key]:
    """The keys of a spec's fields; those of a spec within it have its name in front."""
    keys: dict[str, Key] = {}
    for field in dataclasses.fields(spec) if spec else ():
        name, kind = f"{table}.{field.name}", field_types(spec)[field.name]
        if kind is AttentionSpec:
            continue  # said in one text
        if dataclasses.is_dataclass(kind):
            keys |= list_fields(name, typing.cast(type, kind))
        else:
            default = "the preset's" if spec is ModelSpec else write_words(field.default)
            keys[name] = Key(name, kind, default, spec=spec)
    return keys


@functools.cache
def read_comments(spec: type) -> dict[str, str]:
    """The comment beside each field of a class; of one that takes several lines, the last."""
    text = textwrap.dedent(inspect.getsource(spec))
    lines = text.splitlines()
    body = typing.cast(ast.ClassDef, ast.parse(text).body[0]).body
    fields = [node for node in body if isinstance(node, ast.AnnAssign)]
    beside = {typing.cast(ast.Name, one.target).id: lines[(one.end_lineno or 1) - 1] for one in fields}
    return {name: line.partition("  # ")[2] for name, line in beside.items()}


def find_key(name: str, source: str) -> Key:
    """The key of that name. Raises SpecError naming the nearest one that there is."""
    if name in list_keys():
        return list_keys()[name]
    raise SpecError(f"{source}: unknown key {name[:LONGEST]!r}: did you mean {nearest(name)}?")


def nearest(name: str, known: Iterable[str] = ()) -> str:
    """The known name that is most like another: in the whole, or behind the dot, where the table was wrong."""
    names, name = [*known] or [*list_keys()], name[:LONGEST]
    by_last: dict[str, list[str]] = {}
    for one in names:
        by_last.setdefault(one.rpartition(".")[2], []).append(one)
    table, _, last = name.rpartition(".")
    for likeness in (0.75, 0.0):  # the field's own name first: a wrong table is a likelier error than a wrong field
        within = [one for one in names if one.rpartition(".")[0] == table]
        if close := difflib.get_close_matches(name, within, n=1, cutoff=max(likeness, 0.6)):
            return close[0]
        if close := difflib.get_close_matches(last, by_last, n=1, cutoff=likeness):
            return difflib.get_close_matches(name, by_last[close[0]], n=1, cutoff=0)[0]
    return names[0]


def read_value(key: Key, value: Any, source: str) -> Any:
    """A key's value, given as TOML has it, as the spec's field holds it; a share stays a text.

    Raises SpecError naming key, value and what is accepted.
    """
    what = f"{source}: {key.name}"
    if isinstance(value, str):
        if key.name == "optim.warmup":
            read_share(value, what)
            return value
        if key.name == "saving.seconds":
            value = read_seconds(value, what)
    settled = fit(key.kind, value, what)
    if isinstance(settled, int) and not -LARGEST <= settled <= LARGEST:
        refuse(what, settled, "a number of 64 bits holds no more")
    if key.least is not None and settled is not None and settled < key.least:
        refuse(what, settled, f"give a whole number, at least {key.least}")
    if key.name == "model.preset":
        preset(settled)
    elif key.name == "model.attention":
        attention(settled)
    return settled


def fit(kind: Any, value: Any, what: str) -> Any:
    """A value of TOML as a field of type `kind` holds it: "none" for nothing, one thing for a list of one, a table for
    a spec, a text for a spec's first field."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = [one for one in arguments if one is not types.NoneType]
        if value is None or (value == NOTHING and not has_nothing(kinds[0])):
            return None
        return fit(kinds[0], value, what) if len(kinds) == 1 else settle(kind, value, what)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(
            fit(arguments[0], item, f"{what}[{i}]" if items is value else what) for i, item in enumerate(items)
        )
    if isinstance(kind, type) and issubclass(kind, Spec):
        return value if isinstance(value, kind) else fit_spec(kind, value, what)
    settled = settle(kind, value, what)
    if kind is str and not is_text(settled):
        refuse(what, settled, "expected a text, not empty, of letters that UTF-8 has, and without NUL")
    return settled


def is_text(value: str) -> bool:
    """Whether a file in TOML holds it, and it may name something."""
    return value != "" and not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value)


def has_nothing(kind: Any) -> bool:
    """Whether "none" is a value of its own."""
    return isinstance(kind, type) and issubclass(kind, Enum) and NOTHING in [str(member) for member in kind]


def fit_spec(kind: type, value: Any, what: str) -> Any:
    """A table as a spec; a text is its first field."""
    hints = field_types(kind)
    given = {next(iter(hints)): value} if isinstance(value, str) else value
    if not isinstance(given, dict):
        refuse(what, value, f"expected a text, or a table of {', '.join(hints)}")
    for name in given:
        if name not in hints:
            raise SpecError(f"{what}: unknown key {name[:LONGEST]!r}: did you mean {nearest(name, hints)}?")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in given:
            raise SpecError(f"{what}: key {field.name!r} is missing: add it")
    return kind(**{name: fit(hints[name], one, f"{what}.{name}") for name, one in given.items()})


def read_share(text: str, what: str = "share") -> float:
    """The part that a text such as "1%" says. Raises SpecError for another text, or a part beyond the whole."""
    found = re.fullmatch(r"\s*(\d{1,3}(?:\.\d+)?)\s*%\s*", text)
    if not found or float(found[1]) > 100:
        refuse(what, text, f"expected {FORMS['optim.warmup']}")
    return float(found[1]) / 100


def count_steps(value: int | str, steps: int) -> int:
    """Steps that are said as a number, or as a share of all."""
    return value if isinstance(value, int) else int(read_share(value) * steps)


def read_seconds(text: str, what: str) -> float:
    """The seconds that a text such as "10 min" says. Raises SpecError for an unknown unit."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
    if not found or found[2] not in SECONDS:
        refuse(what, text, f"expected {FORMS['saving.seconds']}")
    return float(found[1]) * SECONDS[found[2]]


def write_kind(kind: Any) -> str:
    """What a key takes, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = [write_kind(one) for one in arguments if one is not types.NoneType]
        optional = types.NoneType in arguments and not any(map(has_nothing, arguments))
        return " or ".join(kinds + [f'"{NOTHING}"'] * optional)
    if origin is tuple:
        return f"list of {write_kind(arguments[0])}"
    if issubclass(kind, Enum):
        return ", ".join(f'"{member}"' for member in kind)
    if issubclass(kind, Spec):
        return f"text or table of {', '.join(field_types(kind))}"
    return {bool: "true, false", int: "whole number", float: "number", str: "text"}.get(kind, kind.__name__)


def write_words(value: Any) -> str:
    """A default as a file would say it."""
    if value is dataclasses.MISSING:
        return "-"
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(write_words, value))}]"
    return str(value)
