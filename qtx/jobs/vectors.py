"""What `qtx vectors` does: golden vectors of an artifact, written, or held against a backend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from qtx_ref.spec import SpecError

from ..engines.machine import Machine
from ..engines.protocols import IntegerModel
from ..files.artifact import SUFFIX, Artifact, load_artifact
from ..files.checkpoint import Checkpoint
from ..files.container import FileError, check_writable
from ..files.vectors import list_differing, load_vectors, run_vectors, save_vectors, take_inputs
from .opening import make_artifact_model, open_model

COUNT = 2


@dataclass(frozen=True)
class VectorsRequest:
    """An artifact, the file to write, and of how many sequences or images of which data."""

    model: Path
    out: Path
    count: int = COUNT
    strict: bool = False  # integer dtypes only
    data: str | None = None  # None: the model's own
    tokenizer: Path | None = None
    machine: Machine = Machine()


@dataclass(frozen=True)
class CheckRequest:
    """An artifact, vectors of it, and the machine that is held to them."""

    model: Path
    vectors: Path
    strict: bool = False  # integer dtypes only
    machine: Machine = Machine()


def write_vectors(request: VectorsRequest) -> tuple[list[str], int]:
    """Runs an artifact on a few inputs of its evaluation split and writes inputs, codes, accumulators and outputs.

    Returns the names of the tensors, in the order of the forward pass, and the number of inputs.

    Raises:
        SpecError: `out` has an artifact's name, a model that is none, or a machine that is not to be had.
        FileError: `out` exists or cannot be written, or the model cannot be read.
        DataError, MissingExtra: data that cannot be had, or a package that is not installed.
    """
    out = request.out
    if out.suffix.lower() == SUFFIX:
        raise SpecError(f"--out {out}: vectors are no model; give a name ending in .safetensors")
    if out.exists():
        raise FileError(f"{out} exists: choose another --out")
    check_writable(out)
    request.machine.check()
    check = partial(refuse_float, request.model)
    opened = open_model(
        request.model, request.machine, request.data, request.tokenizer, strict=request.strict, check=check
    )
    batch = next(iter(opened.data.split_batches("evaluation", opened.stored.spec, request.count, 0, limit=1)))
    tensors = run_vectors(cast(IntegerModel, opened.model), dict(batch))
    save_vectors(out, request.model, tensors)
    return list(tensors), len(next(iter(batch.values())))


def refuse_float(path: Path, stored: Checkpoint | Artifact) -> None:
    """Raises SpecError for a checkpoint, which has no codes."""
    if not isinstance(stored, Artifact):
        raise SpecError(f"{path} is a checkpoint, and vectors are of integers: make a MODEL{SUFFIX} with qtx quantize")


def check_vectors(request: CheckRequest) -> tuple[int, list[str]]:
    """Runs the inputs of vectors again.

    Returns the number of tensors, and the names of those that differ, in the order of the forward pass.

    Raises:
        SpecError: a machine that is not to be had.
        FileError: a file that cannot be read, or vectors of another model.
    """
    artifact = load_artifact(request.model)
    expected = load_vectors(request.vectors, request.model, artifact.spec)
    model = cast(IntegerModel, make_artifact_model(artifact, request.machine, strict=request.strict))
    tensors = run_vectors(model, take_inputs(expected))
    return len(tensors), list_differing(expected, tensors)
