"""What `qtx cost` runs its variants on: evaluation data cut to size, or random ids and images where there are none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from qtx_ref.random import stream
from qtx_ref.spec import Family, Head, ModelSpec, SpecError

from ..prepare.quantization import BATCH
from ..progress import Progress

SEARCHED = 16  # evaluation batches looked through for sequences that are long enough
INPUTS = ("tokens", "mask", "types", "images")
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Cell:
    """Inputs of one batch size and length; `real`: of the model's data, and not random."""

    batch: int
    length: int
    inputs: Batch
    real: bool

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.length}"

    @property
    def padded(self) -> bool:
        return "mask" in self.inputs and not self.inputs["mask"].all()


def synthetic(spec: ModelSpec, size: int, length: int) -> Batch:
    """Random tokens, all real, or random images; with targets for a training step."""
    rng = stream(0, "cost", size, length)
    if spec.family is Family.VIT:
        images = rng.normal(size=(size, spec.channels, spec.image_size, spec.image_size)).astype(np.float32)
        return {"images": images, "labels": rng.integers(0, max(spec.classes, 1), size)}
    tokens = rng.integers(0, spec.vocab, (size, length))
    batch = {"tokens": tokens, "mask": np.ones(tokens.shape, bool)}
    if spec.family is Family.BERT:
        batch["types"] = np.zeros_like(tokens)
    if spec.head is Head.CLASSIFY:
        return batch | {"labels": rng.integers(0, spec.classes, size)}
    return batch | {"targets": tokens}


def make_cell(spec: ModelSpec, data: Any | None, size: int, length: int) -> Cell:
    """Evaluation data: sequences of at least `length` tokens cut there, then, where too few are as long, padded ones.
    Random inputs where there are no data, too few, or none as long."""
    rows = evaluation_rows(spec, data, size, length)
    if len(rows) >= size and (spec.family is Family.VIT or reaches(rows[0], length)):
        return Cell(size, length, stacked(rows[:size], length), True)
    found = synthetic(spec, size, length)
    return Cell(size, length, {name: found[name] for name in INPUTS if name in found}, False)


def evaluation_rows(spec: ModelSpec, data: Any | None, size: int, length: int) -> list[Batch]:
    """Single sequences or images of the first evaluation batches; sequences that reach `length` come first."""
    if data is None:
        return []
    limit = SEARCHED + -(-size // BATCH)
    rows = [
        {name: batch[name][i] for name in INPUTS if name in batch}
        for batch in data.split_batches("evaluation", spec, BATCH, 0, limit=limit)
        for i in range(len(next(iter(batch.values()))))
    ]
    return rows if spec.family is Family.VIT else sorted(rows, key=lambda row: not reaches(row, length))


def reaches(row: Batch, length: int) -> bool:
    """Whether a sequence has so many tokens."""
    return bool(row["mask"][length - 1 : length].any())


def stacked(rows: list[Batch], length: int) -> Batch:
    """Sequences cut or padded to `length`, or images, as one batch; a padded token is id 0, which the mask hides."""

    def fitted(name: str, value: np.ndarray) -> np.ndarray:
        if name == "images":
            return value
        return np.pad(value[:length], (0, max(0, length - len(value))))

    return {name: np.stack([fitted(name, row[name]) for row in rows]) for name in rows[0]}


def lengths_of(spec: ModelSpec, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """Sequence lengths to measure. Raises SpecError for one that the model cannot take."""
    if spec.family is Family.VIT:
        if wanted not in (None, (spec.length,)):
            raise SpecError(f"--length {','.join(map(str, wanted))}: this vit has {spec.length} tokens; leave it out")
        return (spec.length,)
    for length in wanted or ():
        if not 1 <= length <= spec.length:
            raise SpecError(f"--length {length}: the model's length is {spec.length}; give 1 to {spec.length}")
    return wanted or tuple(n for n in (64, 128) if n <= spec.length) or (spec.length,)


def full_rows(batch: Batch) -> Batch:
    """The sequences of a batch that have no padding."""
    full = batch["mask"].all(axis=1)
    return {name: value[full] for name, value in batch.items()}


def write_batch(path: Path, batch: Batch) -> None:
    save_file({name: np.ascontiguousarray(value) for name, value in batch.items()}, str(path))


class Random:
    """Random calibration batches, where a model has no data: times and memory are right, errors are not those of data."""

    def __init__(self, length: int) -> None:
        self.length = length

    def split_batches(
        self, split: str, spec: ModelSpec, batch_size: int, seed: int, limit: int | None = None
    ) -> Iterator[Batch]:
        """One batch, whatever the split."""
        return iter([synthetic(spec, batch_size, self.length)])

    def hashes(self, split: str) -> list[str]:
        return []


class Counted:
    """Data whose batches move a bar on."""

    def __init__(self, data: Any, bar: Progress) -> None:
        self.data, self.bar = data, bar
        self.hashes = data.hashes

    def split_batches(
        self, split: str, spec: ModelSpec, batch_size: int, seed: int, limit: int | None = None
    ) -> Iterator[Batch]:
        """The data's, `limit` of which fill the bar."""
        self.bar.total = limit or 0
        for batch in self.data.split_batches(split, spec, batch_size, seed, limit=limit):
            yield batch
            self.bar.advance()


def calibration_files(folder: Path, spec: ModelSpec, data: Any, limit: int, length: int, masked: bool) -> list[Path]:
    """Calibration batches for an engine's own tools, cut to `length`; without a mask, of full sequences alone."""
    paths = []
    for i, batch in enumerate(data.split_batches("calibration", spec, BATCH, 0, limit=limit)):
        kept = {name: batch[name] for name in INPUTS if name in batch}
        if "mask" in kept:
            kept = {name: value[:, :length] for name, value in kept.items()}
            kept = kept if masked else full_rows(kept)
        if len(next(iter(kept.values()))):
            paths.append(folder / f"calibration-{i}.inputs")
            write_batch(paths[-1], kept)
    return paths
