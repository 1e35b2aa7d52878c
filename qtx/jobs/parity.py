"""What `qtx parity FILE` does: torch held to the reference on one model. What compares them is given: the proof is not
needed to use qtx."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from qtx_ref.spec import InputTransform, ModelSpec, Range

from ..engines.machine import Machine
from ..engines.protocols import Batch, IntegerModel, Model
from ..files.artifact import Artifact
from ..files.checkpoint import Checkpoint, file_of
from ..files.container import sha_of
from ..recipes.named import resolve
from .opening import Opened, make_artifact_model, open_model

FEW = 4  # sequences of a batch
Advance = Callable[[int, int, Any], None]  # rows done, all rows, the last row


class Report(Protocol):
    """What a runner reports; `check_file` puts the file on it."""

    file: str
    sha256: str


R_co = TypeVar("R_co", bound=Report, covariant=True)


class Runner(Protocol[R_co]):
    """What holds torch to the reference: `parity_tests.runner` is one."""

    def check_checkpoint(
        self,
        spec: ModelSpec,
        params: Mapping[str, np.ndarray],
        batches: Sequence[Batch],
        quants: Mapping[str, Any] | None = None,
        ranges: Mapping[str, Range] | None = None,
        *,
        masked_scores: bool = False,
        transforms: Mapping[str, InputTransform] | None = None,
        calibration: Sequence[Batch] = (),
        quantize: bool = False,
        device: str = "cpu",
        progress: Advance | None = None,
    ) -> R_co:
        """In float and, where there are `quants`, under them; with `calibration`, the ranges that both choose."""

    def check_integers(
        self,
        reference: Model | IntegerModel,
        model: Model | IntegerModel,
        batch: Batch,
        *,
        device: str = "cpu",
        progress: Advance | None = None,
    ) -> R_co:
        """Every code of every site of two integer models."""


@dataclass(frozen=True)
class ParityRequest:
    """A checkpoint or an artifact, where torch runs it, and on which data."""

    path: Path
    device: str = "cpu"
    data: str | None = None  # None: the model's own
    tokenizer: Path | None = None


def check_file(request: ParityRequest, runner: Runner[R_co], advance: Advance | None = None) -> R_co:
    """The runner's report on a file, from its evaluation and calibration data. `advance` is called after each row.

    Raises:
        SpecError, FileError, DataError: a device, a file or data that cannot be had or do not fit.
        MissingExtra, MissingDevice: torch or a tokenizer's package is not installed, or the device not there.
    """
    machine = Machine("torch", request.device)
    machine.check()
    opened = open_model(request.path, Machine("ref"), request.data, request.tokenizer)
    if isinstance(opened.stored, Artifact):
        report = runner.check_integers(
            opened.model,
            make_artifact_model(opened.stored, machine),
            read_batches(opened, "evaluation", 1)[0],
            device=request.device,
            progress=advance,
        )
    else:
        report = check_stored(opened.stored, opened, request.device, runner, advance)
    report.file, report.sha256 = str(request.path), sha_of(file_of(request.path))
    return report


def check_stored(
    source: Checkpoint, opened: Opened, device: str, runner: Runner[R_co], advance: Advance | None
) -> R_co:
    """The report on a checkpoint, in float and under its own recipe where it has one."""
    chosen = source.recipe
    return runner.check_checkpoint(
        source.spec,
        source.params,
        read_batches(opened, "evaluation", 1),
        resolve(chosen, source.spec) if chosen else {},
        source.ranges,
        masked_scores=bool(chosen and chosen.masked_scores),
        transforms=source.transforms,
        calibration=read_batches(opened, "calibration", 2) if chosen else (),
        quantize=bool(chosen and chosen.quantize_while_calibrating),
        device=device,
        progress=advance,
    )


def read_batches(opened: Opened, split: str, count: int) -> list[Batch]:
    """The first batches of a split of the model's data."""
    return list(opened.data.split_batches(split, opened.stored.spec, FEW, 0, limit=count))
