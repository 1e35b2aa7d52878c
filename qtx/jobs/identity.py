"""How one run is told from another, and what of it may change while it goes on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qtx_ref.spec import SpecError, from_dict, to_dict

from ..engines.machine import Machine, identify_machine
from ..engines.protocols import Data
from ..files.container import FileError
from .run import TrainSpec, describe_difference

FREE = frozenset({"stop", "evaluation", "saving", "log"})  # of a TrainSpec: may be others when a run goes on
TOLD = ("stop", "data.source", "data.sources")  # may be others too; that they were is kept
CHANGEABLE = ("optim", "step", "batch", "machine", "threads", "processes")  # may be others where that is asked for
MOVE = frozenset({"machine.backend", "machine.device", "threads", "processes"})  # of these what --move asks for
EARLIER = ("watch_integer",)  # fields that a TrainSpec had

Change = dict[str, Any]  # {field, was, now}, and in a checkpoint the step


def identify(run: TrainSpec, data: Data, machine: Machine) -> dict[str, Any]:
    """What a checkpoint keeps of its run, as JSON values; `find_changes` says what of it must be equal."""
    return {"train": to_dict(run), **identify_machine(machine), "data": data.describe()}


def find_changes(path: Path, meta: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str]) -> list[Change]:
    """What of a run is no more as its checkpoint's `meta` says, and may be; `now` is the whole of `identify` or some of
    it.

    A run goes on with the bits of the uninterrupted one where nothing changed. What is in `FREE` may change always, of
    it `stop` is told; so may the place of the data, which are known by their fingerprints. What lies in `CHANGEABLE`
    may where `allowed` names it (`optim.steps`, or `optim` for all of it); nothing else may ever. A field that the file
    does not know has its default.

    Raises FileError naming what differs, and how to allow it.
    """
    changes = []
    was, known = read_identity(path, meta), read_identity(path, {**meta, **now})
    for field in dict.fromkeys([*known, *was]):
        before, after = was.get(field), known.get(field)
        if before == after or field.partition(".")[0] in FREE - {"stop"}:
            continue
        if field not in TOLD and not may_change(field, allowed):
            words = describe_difference(field, before, after)
            raise FileError(f"{path} is another run: {words}{name_remedy(field)}")
        changes.append({"field": field, "was": before, "now": after})
    return changes


def read_identity(path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run by dotted name, those of its `TrainSpec` without `train` before them. Raises FileError where
    they are none."""
    train = {key: value for key, value in meta["train"].items() if key not in EARLIER}
    try:
        whole = to_dict(from_dict(TrainSpec, train)) | {"machine": to_dict(from_dict(Machine, meta["machine"]))}
    except (KeyError, SpecError) as error:
        raise FileError(f"{path} holds no run that can be resumed ({error}); choose another --out") from None
    data = {key: value for key, value in meta.get("data", {}).items() if key != "hashes"}
    return flatten(whole | {"threads": meta.get("threads"), "processes": meta.get("processes", 1), "data": data})


def flatten(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted name."""
    leaves: dict[str, Any] = {}
    for name, one in value.items():
        leaves |= flatten(one, f"{before}{name}.") if isinstance(one, dict) else {f"{before}{name}": one}
    return leaves


def may_change(field: str, allowed: Collection[str]) -> bool:
    """Whether one of the `allowed` names is this field, or what it lies in."""
    return field != "optim.only" and any(field == name or field.startswith(f"{name}.") for name in allowed)


def name_remedy(field: str) -> str:
    """How a field may be another when a run goes on, in words."""
    if may_change(field, MOVE):
        return ", or go on with --move of qtx train or finetune"
    name = "data.batch" if field == "batch" else field  # as a run's file has it
    return f", or go on with --change {name} of qtx train or finetune" if may_change(field, CHANGEABLE) else ""


def check_changes(allowed: Collection[str]) -> None:
    """Raises SpecError for a field that no run can change."""
    for name in allowed:
        if name.partition(".")[0] not in CHANGEABLE or name == "optim.only":
            raise SpecError(f"change is {name!r}: a run can change {', '.join(CHANGEABLE)}, or a field of these")
