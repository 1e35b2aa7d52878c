"""Checkpoints: one safetensors file with JSON in its metadata. Nothing is ever unpickled.

Tensors: parameters by name (tied weights once), `optim.*` of a trainer, `history.*` of its run, and for a quantized
model `range.<site>.{low,high,scale,zero_point}` and `transform.<site>.divisor`. Metadata `qtx`: format, version, model
spec, what made the file, and a sha256 over all of it, which reading compares. A file is written beside its final name
and renamed, so that a kill leaves the old one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.models.initial import shapes
from qtx_ref.quant import rewriting
from qtx_ref.spec import (
    InputTransform,
    ModelSpec,
    Range,
    Recipe,
    SpecError,
    TransformKind,
    from_dict,
    to_dict,
)

from ..recipes.transforms import list_left_transforms, make_left_transforms
from .container import (
    CHECKPOINT,
    VERSIONS,
    FileError,
    check_file,
    check_seal,
    open_sealed,
    tell_unsealed,
    write_sealed,
)
from .formats import JsonObject

APART = ("optim.", "history.", "range.", "learned.", "transform.", "hub.")
STATE = ("range.", "transform.")  # of these, what `Checkpoint` has fields for
KEYS = {"format", "version", "spec", "recipe", "meta"}  # of the header, beside its sha256


@dataclass
class Checkpoint:
    """A model's spec and parameters; `extra` holds tensors apart from them, `recipe`, `ranges` and `transforms` (at
    linears' inputs, for which the parameters are made) a quantizer's state, `meta` JSON values about the run (data,
    training, metrics)."""

    spec: ModelSpec
    params: Mapping[str, np.ndarray]
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    recipe: Recipe | None = None
    ranges: dict[str, Range] = field(default_factory=dict)
    meta: JsonObject = field(default_factory=dict)
    transforms: dict[str, InputTransform] = field(default_factory=dict)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the file. Raises FileError where a parameter is not finite, naming it; an old file stays."""
    write_sealed(path, *take_apart(path, checkpoint))


def take_apart(path: Path, checkpoint: Checkpoint) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """Header and tensors of a checkpoint that is to be written at `path`. Raises FileError where one is not finite."""
    tensors = {**checkpoint.params, **checkpoint.extra}
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise FileError(f"{path}: tensor {name} holds NaN or infinity; not saved")
    for site, range_ in checkpoint.ranges.items():
        tensors |= {f"range.{site}.{key}": np.asarray(value) for key, value in range_._asdict().items()}
    for site, how in checkpoint.transforms.items():
        if how.divisor is not None:
            tensors[f"transform.{site}.divisor"] = how.divisor
    header = {
        "format": CHECKPOINT,
        "version": VERSIONS[CHECKPOINT],
        "spec": to_dict(checkpoint.spec),
        "recipe": to_dict(checkpoint.recipe),
        "meta": checkpoint.meta,
    }
    return header, tensors


def file_of(path: Path) -> Path:
    """The checkpoint itself, where its folder was given."""
    return path / "model.safetensors" if path.is_dir() else path


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a file that `save_checkpoint` wrote; every shape is compared before a tensor is read.

    Raises:
        FileError: missing, empty, truncated, of another format, wrong or missing tensors, NaN, anything changed since.
    """
    path = file_of(path)
    check_file(path, say_missing(path))
    with open_sealed(path, CHECKPOINT) as (header, file):
        spec = read_spec(path, header)
        names = set(file.keys())
        check_shapes(path, spec, {name: tuple(file.get_slice(name).get_shape()) for name in names})
        tensors = {name: file.get_tensor(name) for name in sorted(names)}
        if sealed := "sha256" in header:
            check_seal(path, header, file.metadata()["qtx"], tensors)
    checkpoint = put_together(path, spec, header, tensors)
    if not sealed:
        tell_unsealed(path)
    return checkpoint


def say_missing(path: Path) -> str:
    """What to do where there is no such checkpoint."""
    if path.parent.suffix == ".shares" or any(path.parent.glob(f"{path.stem}-*.shares")):
        return "not written yet, the run's processes share its state: the last step makes it; go on with --resume"
    return "no such checkpoint; give a .safetensors file that qtx wrote, or its folder"


def put_together(
    path: Path, spec: ModelSpec, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Checkpoint:
    """The checkpoint of a header and of tensors of the right shapes. Raises FileError for numbers that are not finite,
    and parts that do not fit each other."""
    params = {name: tensors[name] for name in shapes(spec)}
    for name, value in tensors.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise FileError(f"{path}: tensor {name} holds NaN or infinity; train again or take an earlier file")
    for name, value in params.items():
        if value.dtype not in (np.float32, np.float64):
            raise FileError(f"{path}: parameter {name} is {value.dtype}; expected float32 or float64")
    try:
        recipe = None if header["recipe"] is None else from_dict(Recipe, header["recipe"])
    except SpecError as error:
        raise FileError(f"{path}: {error}") from None
    ranges = read_ranges(path, recipe, tensors)
    transforms = read_transforms(path, spec, params, recipe, tensors)
    extra = {name: value for name, value in tensors.items() if name.startswith(APART) and not name.startswith(STATE)}
    return Checkpoint(spec, params, extra, recipe, ranges, header["meta"], transforms)


def read_ranges(path: Path, recipe: Recipe | None, tensors: Mapping[str, np.ndarray]) -> dict[str, Range]:
    """The static ranges. Raises FileError for one that is not whole, or that the recipe's quantizer cannot have."""
    sites = sorted({name.removeprefix("range.").rpartition(".")[0] for name in tensors if name.startswith("range.")})
    try:
        ranges = {site: Range(*(tensors[f"range.{site}.{key}"] for key in Range._fields)) for site in sites}
    except KeyError as error:
        raise FileError(f"{path}: tensor {error} is missing") from None
    for site, range_ in ranges.items():
        quant = recipe.quant(site) if recipe else None
        zeros = range_.zero_point
        if not (range_.scale > 0).all() or range_.scale.shape != zeros.shape or not zeros.size:
            raise FileError(f"{path}: the scale of site {site} must be positive and of its zero point's shape")
        if quant is None or zeros.dtype.kind != "i" or zeros.min() < quant.code_min or zeros.max() > quant.code_max:
            raise FileError(f"{path}: the zero point of site {site} is no code of the recipe's quantizer")
    return ranges


def read_transforms(
    path: Path,
    spec: ModelSpec,
    params: Mapping[str, np.ndarray],
    recipe: Recipe | None,
    tensors: Mapping[str, np.ndarray],
) -> dict[str, InputTransform]:
    """The transforms at linears' inputs: the recipe's rotations, and the file's divisors. Raises FileError for a
    divisor that is missing, that the recipe has no place for, or that does not fit."""
    divisors = {
        name.removeprefix("transform.").removesuffix(".divisor"): value
        for name, value in tensors.items()
        if name.startswith("transform.")
    }
    if not divisors and not (recipe and recipe.transforms):
        return {}
    try:
        left = list_left_transforms(recipe, spec) if recipe else {}
        expected = {site for site, how in left.items() if how.kind is TransformKind.SMOOTH}
        if odd := sorted(expected ^ divisors.keys()):
            raise FileError(f"{path}: its recipe and tensor transform.{odd[0]}.divisor do not belong together")
        for site, divisor in divisors.items():
            weight = rewriting.own_weight(params, site)
            width = weight.shape[-1] * (len(weight) if weight.ndim == 3 else 1)
            if divisor.shape != (width,) or divisor.dtype != np.float32 or not (divisor > 0).all():
                raise FileError(f"{path}: the divisor of {site} must be {width} positive numbers, float32")
        return make_left_transforms(recipe, spec, params, divisors) if recipe else {}
    except SpecError as error:
        raise FileError(f"{path}: {error}") from None


def read_spec(path: Path, header: Mapping[str, object]) -> ModelSpec:
    """The model's spec. Raises FileError where the header lacks a key or has an unknown one, or the spec is none."""
    if missing := KEYS - header.keys():
        raise FileError(f"{path}: metadata lacks {sorted(missing)[0]!r}")
    if unknown := header.keys() - KEYS - {"sha256"}:
        raise FileError(f"{path}: unknown key in its metadata is {sorted(unknown)[0]!r}")
    try:
        return from_dict(ModelSpec, header["spec"])
    except SpecError as error:
        raise FileError(f"{path}: {error}") from None


def check_shapes(path: Path, spec: ModelSpec, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Raises FileError for the first parameter that is missing, unknown or of another shape."""
    if spec.layers > len(stored):  # before as many names are made
        raise FileError(f"{path}: its model has {spec.layers} layers, and it holds {len(stored)} tensors")
    expected = shapes(spec)
    for name, shape in expected.items():
        if name not in stored:
            raise FileError(f"{path}: parameter {name} is missing")
        if stored[name] != shape:
            raise FileError(f"{path}: parameter {name} has shape {stored[name]}; this model's is {shape}")
    for name in sorted(stored):
        if name not in expected and not name.startswith(APART):
            raise FileError(f"{path}: unknown tensor {name}; this model has no such parameter")
