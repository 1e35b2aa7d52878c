"""Checkpoints: one safetensors file with JSON in its metadata. Nothing is ever unpickled.

Tensors: parameters by name (tied weights once), `optim.*` of a trainer, `history.*` of its run, and for a quantized model
`range.<site>.{low,high,scale,zero_point}`. Metadata `qtx`: format, version, model spec, and what made the file. A file is
written beside its final name and renamed, so that a kill leaves the old one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qtx_ref.models.initial import shapes
from qtx_ref.spec import ModelSpec, Range, Recipe, SpecError, from_dict, to_dict

FORMAT = "qtx-checkpoint"
VERSION = 1
APART = ("optim.", "history.", "range.", "learned.")


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint, or that would be overwritten. The message names it and why."""


@dataclass
class Checkpoint:
    """A model's spec and parameters; `extra` holds tensors apart from them, `recipe` and `ranges` a quantizer's state,
    `meta` JSON values about the run (data, training, metrics)."""

    spec: ModelSpec
    params: dict[str, np.ndarray]
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    recipe: Recipe | None = None
    ranges: dict[str, Range] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


def check_writable(path: Path) -> None:
    """Raises CheckpointError where a file of that name could not be written, before any work is done for it."""
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror}): choose another place") from None


def write_beside(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment either the old or the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the file. Raises CheckpointError where a parameter is not finite, naming it; an old file stays."""
    tensors = checkpoint.params | checkpoint.extra
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity; not saved")
    for site, found in checkpoint.ranges.items():
        tensors |= {f"range.{site}.{key}": np.asarray(value) for key, value in found._asdict().items()}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "spec": to_dict(checkpoint.spec),
        "recipe": to_dict(checkpoint.recipe),
        "meta": checkpoint.meta,
    }
    write_beside(path, save({k: np.asarray(v, order="C") for k, v in tensors.items()}, {"qtx": json.dumps(header)}))


def file_of(path: Path) -> Path:
    """The checkpoint itself, where its folder was given."""
    return path / "model.safetensors" if path.is_dir() else path


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a file that `save_checkpoint` wrote; every shape is compared before a tensor is read.

    Raises:
        CheckpointError: missing, empty, truncated, of another format, wrong or missing tensors, NaN.
    """
    path = file_of(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give a .safetensors file that qtx wrote, or its folder")
    try:
        with safe_open(path, framework="np") as file:
            spec, header = read_header(path, file.metadata())
            names = set(file.keys())
            check_shapes(path, spec, {name: tuple(file.get_slice(name).get_shape()) for name in names})
            tensors = {name: file.get_tensor(name) for name in sorted(names)}
    except (SafetensorError, OSError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from None
    params = {name: tensors[name] for name in shapes(spec)}
    for name, value in tensors.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity; train again or take an earlier file")
    for name, value in params.items():
        if value.dtype not in (np.float32, np.float64):
            raise CheckpointError(f"{path}: parameter {name} is {value.dtype}; expected float32 or float64")
    try:
        recipe = None if header["recipe"] is None else from_dict(Recipe, header["recipe"])
    except SpecError as error:
        raise CheckpointError(f"{path}: {error}") from None
    sites = sorted({name.removeprefix("range.").rpartition(".")[0] for name in names if name.startswith("range.")})
    try:
        ranges = {site: Range(*(tensors[f"range.{site}.{key}"] for key in Range._fields)) for site in sites}
    except KeyError as error:
        raise CheckpointError(f"{path}: tensor {error} is missing") from None
    for site, found in ranges.items():
        quant = recipe.quant(site) if recipe else None
        zeros = found.zero_point
        if not (found.scale > 0).all() or found.scale.shape != zeros.shape:
            raise CheckpointError(f"{path}: the scale of site {site} must be positive and of its zero point's shape")
        if quant is None or zeros.dtype.kind != "i" or zeros.min() < quant.code_min or zeros.max() > quant.code_max:
            raise CheckpointError(f"{path}: the zero point of site {site} is no code of the recipe's quantizer")
    extra = {name: value for name, value in tensors.items() if name.startswith(APART) and not name.startswith("range.")}
    return Checkpoint(spec, params, extra, recipe, ranges, header["meta"])


def read_header(path: Path, metadata: Mapping[str, str] | None) -> tuple[ModelSpec, dict[str, Any]]:
    """The model's spec and the whole header of a file's metadata."""
    try:
        header = json.loads((metadata or {})["qtx"])
    except (KeyError, json.JSONDecodeError):
        raise CheckpointError(f"{path}: a safetensors file without qtx's metadata; was it made by qtx?") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
        raise CheckpointError(f"{path}: format is not {FORMAT} version {VERSION}; use the qtx that wrote it")
    meta = header.get("meta", {})
    if not isinstance(meta, dict) or not isinstance(meta.get("data", {}), dict):
        raise CheckpointError(f"{path}: metadata is damaged: 'meta' and its 'data' must be objects")
    if missing := {"spec", "recipe", "meta"} - header.keys():
        raise CheckpointError(f"{path}: metadata lacks {sorted(missing)[0]!r}")
    try:
        return from_dict(ModelSpec, header["spec"]), header
    except SpecError as error:
        raise CheckpointError(f"{path}: {error}") from None


def check_shapes(path: Path, spec: ModelSpec, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError for the first parameter that is missing, unknown or of another shape."""
    expected = shapes(spec)
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{path}: parameter {name} is missing")
        if found[name] != shape:
            raise CheckpointError(f"{path}: parameter {name} has shape {found[name]}; this model's is {shape}")
    for name in sorted(found):
        if name not in expected and not name.startswith(APART):
            raise CheckpointError(f"{path}: unknown tensor {name}; this model has no such parameter")
