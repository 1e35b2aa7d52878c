"""What `qtx cost` runs its variants on: evaluation data cut to size, or random ids and images where there are none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from qtx_ref.random import stream
from qtx_ref.spec import Family, Head, ModelSpec, SpecError

from ..data.splits import BATCH
from ..engines.protocols import Batch, Calibration
from ..prepare.calibration import CALIBRATION_SEED
from ..progress import Progress

SEARCHED = 16  # evaluation batches looked through for sequences that are long enough
SAMPLED = 256  # sequences or images on which answers are compared, at least, where the data have them
INPUTS = ("tokens", "mask", "types", "images")


@dataclass(frozen=True)
class Cell:
    """Inputs of one batch size and length; `real`: of the model's data, and not random. `samples`: further batches of
    the same shape, on which answers are compared; empty where another cell of the same length has them."""

    batch: int
    length: int
    inputs: Batch
    real: bool
    samples: tuple[Batch, ...] = ()

    @property
    def name(self) -> str:
        """Batch size and length, as `8x128`."""
        return f"{self.batch}x{self.length}"

    @property
    def padded(self) -> bool:
        """Whether a token of inputs or samples is padding."""
        return any("mask" in batch and not batch["mask"].all() for batch in (self.inputs, *self.samples))


def synthesize(spec: ModelSpec, size: int, length: int) -> Batch:
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


def make_cells(spec: ModelSpec, data: Calibration | None, sizes: Sequence[tuple[int, int]]) -> list[Cell]:
    """A cell for each (batch size, length); of each length the largest batch has the samples, if there is a head."""
    widest = {length: max(size for size, other in sizes if other == length) for _, length in sizes}
    headed = spec.head is not Head.NONE
    return [make_cell(spec, data, size, length, sampled=headed and size == widest[length]) for size, length in sizes]


def make_cell(spec: ModelSpec, data: Calibration | None, size: int, length: int, *, sampled: bool = False) -> Cell:
    """Evaluation data: sequences of at least `length` tokens cut there, then, where too few are as long, padded ones.
    Random inputs where there are no data, too few, or none as long. Samples are SAMPLED sequences or more in whole
    batches, or as many as the data have."""
    batches = -(-SAMPLED // size) if sampled else 0
    rows = read_rows(spec, data, size * max(batches, 1), length)
    if len(rows) >= size and (spec.family is Family.VIT or reaches_length(rows[0], length)):
        whole = [stack(rows[i : i + size], length) for i in range(0, len(rows) - size + 1, size)]
        return Cell(size, length, whole[0], True, tuple(whole[:batches]))
    made = synthesize(spec, size * max(batches, 1), length)
    whole = [
        {name: made[name][i * size : (i + 1) * size] for name in INPUTS if name in made} for i in range(max(batches, 1))
    ]
    return Cell(size, length, whole[0], False, tuple(whole[:batches]))


def read_rows(spec: ModelSpec, data: Calibration | None, size: int, length: int) -> list[Batch]:
    """Single sequences or images of the first evaluation batches; sequences that reach `length` come first."""
    if data is None:
        return []
    limit = SEARCHED + -(-size // BATCH)
    rows: list[Batch] = [
        {name: batch[name][i] for name in INPUTS if name in batch}
        for batch in data.split_batches("evaluation", spec, BATCH, 0, limit=limit)
        for i in range(len(next(iter(batch.values()))))
    ]
    return rows if spec.family is Family.VIT else sorted(rows, key=lambda row: not reaches_length(row, length))


def reaches_length(row: Batch, length: int) -> bool:
    """Whether a sequence has so many tokens."""
    return bool(row["mask"][length - 1 : length].any())


def stack(rows: list[Batch], length: int) -> Batch:
    """Sequences cut or padded to `length`, or images, as one batch; a padded token is id 0, which the mask hides."""

    def fit(name: str, value: np.ndarray) -> np.ndarray:
        if name == "images":
            return value
        return np.pad(value[:length], (0, max(0, length - len(value))))

    return {name: np.stack([fit(name, row[name]) for row in rows]) for name in rows[0]}


def choose_lengths(spec: ModelSpec, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """Sequence lengths to measure. Raises SpecError for one that the model cannot take."""
    if spec.family is Family.VIT:
        if wanted not in (None, (spec.length,)):
            raise SpecError(f"--length {','.join(map(str, wanted))}: this vit has {spec.length} tokens; leave it out")
        return (spec.length,)
    for length in wanted or ():
        if not 1 <= length <= spec.length:
            raise SpecError(f"--length {length}: the model's length is {spec.length}; give 1 to {spec.length}")
    return wanted or tuple(n for n in (64, 128) if n <= spec.length) or (spec.length,)


def keep_full(batch: Batch) -> Batch:
    """The sequences of a batch that have no padding."""
    full = batch["mask"].all(axis=1)
    return {name: value[full] for name, value in batch.items()}


def write_cell(folder: Path, cell: Cell) -> None:
    """A cell's inputs, and its samples, as files: those of `cell_files`."""
    inputs, samples = cell_files(folder, cell)
    write_batch(inputs, cell.inputs)
    for path, batch in zip(samples, cell.samples, strict=True):
        write_batch(path, batch)


def cell_files(folder: Path, cell: Cell) -> tuple[Path, list[Path]]:
    """Where a cell's inputs and its samples lie."""
    return folder / f"{cell.name}.inputs", [folder / f"{cell.name}.{i}.sample" for i in range(len(cell.samples))]


def write_batch(path: Path, batch: Batch) -> None:
    """A batch as a safetensors file."""
    save_file({name: np.ascontiguousarray(value) for name, value in batch.items()}, str(path))


class Random:
    """Random calibration batches, where a model has no data: times and memory are right, errors are not those of
    data."""

    def __init__(self, length: int) -> None:
        self.length = length

    def split_batches(
        self, split: str, spec: ModelSpec, batch_size: int, seed: int, limit: int | None = None
    ) -> Iterator[Batch]:
        """One batch, whatever the split."""
        return iter([synthesize(spec, batch_size, self.length)])

    def hashes(self, split: str) -> list[str]:
        """None: nothing that could be met again."""
        return []


class Counted:
    """Data whose batches move a bar on."""

    def __init__(self, data: Calibration, bar: Progress) -> None:
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


def write_calibration(
    folder: Path, spec: ModelSpec, data: Calibration, limit: int, length: int, masked: bool
) -> list[Path]:
    """Calibration batches for an engine's own tools, cut to `length`; without a mask, of full sequences alone."""
    paths = []
    for i, batch in enumerate(data.split_batches("calibration", spec, BATCH, CALIBRATION_SEED, limit=limit)):
        kept: Batch = {name: batch[name] for name in INPUTS if name in batch}
        if "mask" in kept:
            kept = {name: value[:, :length] for name, value in kept.items()}
            kept = kept if masked else keep_full(kept)
        if len(next(iter(kept.values()))):
            paths.append(folder / f"calibration-{i}.inputs")
            write_batch(paths[-1], kept)
    return paths
