"""Golden vectors: inputs, every code and accumulator in the order of the forward pass, and outputs, in one sealed
file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qtx_ref.spec import Family, ModelSpec

from ..engines.protocols import Arrays, Batch, IntegerModel
from .container import (
    VECTORS,
    VERSIONS,
    FileError,
    read_sealed,
    sha_of,
    write_sealed,
)


def run_vectors(model: IntegerModel, batch: Batch) -> Arrays:
    """`input.*`, `code.<site>` in the order of the forward pass, `output.value`, `.scale`, `.zero_point`."""
    vectors = {f"input.{name}": np.asarray(value) for name, value in batch.items()}
    output = model.run(batch, lambda site, value: vectors.__setitem__(f"code.{site}", np.array(value)))
    return vectors | {f"output.{key}": np.array(value) for key, value in output._asdict().items()}


def save_vectors(path: Path, model: Path, vectors: Arrays) -> None:
    """Writes the vectors of the artifact `model`. Raises FileError where `path` is another kind of file, WriteError
    where it cannot be written."""
    header = {"format": VECTORS, "version": VERSIONS[VECTORS], "model": sha_of(model), "order": list(vectors)}
    write_sealed(path, header, vectors)


def load_vectors(path: Path, model: Path, spec: ModelSpec) -> Arrays:
    """The vectors of the artifact `model`, in order.

    Raises:
        FileError: missing, damaged, changed, of another model, or with inputs that this model does not take.
    """
    header, tensors = read_sealed(path, VECTORS)
    if header.get("model") != sha_of(model):
        raise FileError(f"{path}: not the vectors of {model}; write them with qtx vectors {model} --out FILE")
    order = header.get("order")
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(tensors):
        raise FileError(f"{path}: its order does not name its tensors; write it again")
    check_inputs(path, spec, take_inputs(tensors))
    return {name: tensors[name] for name in order}


def take_inputs(vectors: Arrays) -> Arrays:
    """The batch among the vectors: what is named `input.*`."""
    return {name.removeprefix("input."): value for name, value in vectors.items() if name.startswith("input.")}


def check_inputs(path: Path, spec: ModelSpec, batch: Arrays) -> None:
    """Raises FileError naming the first input that is missing, unknown, or that the model cannot take."""
    image = spec.family is Family.VIT
    limits: dict[str, int | None] = {"images": None} if image else {"tokens": spec.vocab, "mask": 2}
    if spec.family is Family.BERT:
        limits["types"] = spec.types
    extra = {"labels": None} if spec.classes else {"targets": None}
    for name in [*limits, *batch]:
        if name not in batch:
            raise FileError(f"{path}: input {name} is missing")
        if name not in limits | extra:
            raise FileError(f"{path}: input {name} is unknown; this model takes {', '.join(limits)}")
    count = len(next(iter(batch.values()))) if next(iter(batch.values())).ndim else 0
    for name, limit in limits.items():
        value = batch[name]
        if image:
            fits = value.shape == (count, spec.channels, spec.image_size, spec.image_size)
            fits = fits and value.dtype.kind == "f" and bool(np.isfinite(value).all())
        else:
            fits = value.ndim == 2 and value.shape == batch["tokens"].shape and 0 < value.shape[1] <= spec.length
            fits = fits and value.dtype.kind in "biu" and bool((value >= 0).all() and (value < limit).all())
        if not fits or count == 0:
            raise FileError(f"{path}: input {name}, {value.dtype} {value.shape}, is none that this model takes")


def list_differing(expected: Arrays, actual: Arrays) -> list[str]:
    """Names, in the order of the forward pass, of what is not the same: in one only, of another dtype or shape, or
    value."""
    return [
        name
        for name in dict.fromkeys([*expected, *actual])
        if name not in expected
        or name not in actual
        or expected[name].dtype != actual[name].dtype
        or not np.array_equal(expected[name], actual[name])
    ]
