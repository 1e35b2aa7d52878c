"""The artifact: a quantized model as integers, in one safetensors file that NumPy alone can run.

Tensors: the constants of `qtx_ref.integer_numerics`, by their names; weights of at most 4 bits two codes to a byte.
Metadata `qtx`: model, recipe, the whole profile, nonlinear functions, where it came from (sha256 of checkpoint, recipe
and calibration data) and a sha256 over all of it, which reading compares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qtx_ref.integer import pack_int4, unpack_int4
from qtx_ref.integer_numerics import code_dtype
from qtx_ref.lowering import float_params, lower
from qtx_ref.models.initial import shapes
from qtx_ref.spec import (
    ModelSpec,
    Nonlinear,
    Profile,
    QuantSpec,
    Range,
    Recipe,
    SpecError,
    check_integer,
    from_dict,
    to_dict,
)

from . import __version__
from .checkpoint import Checkpoint, CheckpointError, write_beside
from .quantization import SHORT
from .recipes import resolve

FORMAT = "qtx-artifact"
VERSION = 1
SUFFIX = ".qtx"
PACKED_BITS = 4


@dataclass
class Artifact:
    """An integer model. `meta`: `hashes` and `data` of what it was made from, `tokenizer`, `calibration`."""

    spec: ModelSpec
    recipe: Recipe
    profile: Profile
    nonlinear: Nonlinear
    constants: dict[str, np.ndarray]
    meta: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def quants(self) -> dict[str, QuantSpec]:
        return resolve(self.recipe, self.spec)

    def ranges(self) -> dict[str, Range]:
        """The static ranges, as `FakeQuant` takes them."""
        found = {}
        for site, quant in self.quants.items():
            if not quant.dynamic and f"{site}.scale" in self.constants:
                scale, zero = self.constants[f"{site}.scale"], self.constants[f"{site}.zero_point"]
                found[site] = Range(scale * (quant.code_min - zero), scale * (quant.code_max - zero), scale, zero)
        return found

    def float_params(self) -> dict[str, np.ndarray]:
        """The parameters that the codes stand for."""
        return float_params(self.spec, self.constants)

    def packed(self, name: str) -> bool:
        """Whether a constant is stored two codes to a byte: weights of at most 4 bits."""
        quant = self.quants.get(name)
        return quant is not None and quant.bits <= PACKED_BITS and name.endswith(".weight")


def make_artifact(
    source: Path, found: Checkpoint, recipe: Recipe, ranges: Mapping[str, Range], profile: Profile, nonlinear: Nonlinear,
    calibration: list[str],
) -> Artifact:  # fmt: skip
    """A checkpoint in integers. Raises SpecError naming a site that cannot be."""
    constants = lower(found.spec, found.params, resolve(recipe, found.spec), ranges, profile, nonlinear)
    hashes = {
        "checkpoint": hashlib.sha256(source.read_bytes()).hexdigest(),
        "recipe": sha_of(to_dict(recipe)),
        "calibration": sha_of(calibration),
    }
    kept = {key: found.meta[key] for key in ("data", "tokenizer") if key in found.meta}
    if hashes_of := kept.get("data", {}).get("hashes"):  # what an evaluation must not meet, in short
        kept["data"] = kept["data"] | {"hashes": {"train": [h[:SHORT] for h in hashes_of.get("train", [])]}}
    meta = {"qtx": __version__, "hashes": hashes, "calibration": [h[:SHORT] for h in calibration], **kept}
    return Artifact(found.spec, recipe, profile, nonlinear, constants, meta)


def sha_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """One sha256 over the header and every tensor's name, dtype, shape and bytes."""
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        total.update(f"{name} {value.dtype} {tensors[name].shape} ".encode())
        total.update(value.data)
    return total.hexdigest()


def save_artifact(path: Path, artifact: Artifact) -> None:
    """Writes the file; an old one stays whole until the new one is."""
    tensors = {
        name: pack_int4(value) if artifact.packed(name) else np.asarray(value, order="C")
        for name, value in artifact.constants.items()
    }
    header = {"format": FORMAT, "version": VERSION, "spec": to_dict(artifact.spec), "recipe": to_dict(artifact.recipe),
              "profile": to_dict(artifact.profile), "nonlinear": str(artifact.nonlinear), "meta": artifact.meta}  # fmt: skip
    header["sha256"] = digest(header, tensors)
    write_beside(path, save(tensors, {"qtx": json.dumps(header)}))


def load_artifact(path: Path) -> Artifact:
    """Reads a file that `save_artifact` wrote.

    Raises:
        CheckpointError: missing, empty, truncated, changed, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such artifact; make one with qtx quantize CHECKPOINT --out MODEL{SUFFIX}")
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})["qtx"])
            if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
                raise CheckpointError(f"{path}: format is not {FORMAT} version {VERSION}; use the qtx that wrote it")
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged or not an artifact ({error})") from None
    except (KeyError, json.JSONDecodeError):
        raise CheckpointError(f"{path}: a safetensors file without qtx's metadata; was it made by qtx?") from None
    if header.pop("sha256", None) != digest(header, tensors):
        raise CheckpointError(f"{path}: its content is not what was written (sha256 differs); make it again")
    try:
        artifact = Artifact(
            from_dict(ModelSpec, header["spec"]),
            from_dict(Recipe, header["recipe"]),
            from_dict(Profile, header["profile"]),
            from_dict(Nonlinear, header["nonlinear"]),
            tensors,
            header["meta"],
        )
        check_integer(artifact.quants, artifact.profile)
        unpack(artifact)
    except (SpecError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return artifact


def unpack(artifact: Artifact) -> None:
    """Codes of at most 4 bits to one a byte, and every parameter's shape compared. Raises ValueError."""
    constants = artifact.constants
    for name, shape in shapes(artifact.spec).items():
        if name.endswith(".sink"):
            continue
        if name not in constants:
            raise ValueError(f"constant {name} is missing")
        if artifact.packed(name):
            constants[name] = unpack_int4(constants[name], shape[-1], artifact.quants[name].symmetric)
            constants[name] = constants[name].astype(code_dtype(artifact.quants[name]))
        if constants[name].size != np.prod(shape, dtype=np.int64):
            raise ValueError(f"constant {name} has shape {constants[name].shape}; this model's is {shape}")


# --- sizes and differences --------------------------------------------------------------------------------------------


def stored_bytes(artifact: Artifact) -> dict[str, int]:
    """Bytes of each constant as the file holds it."""
    return {
        name: value.size // value.shape[-1] * -(-value.shape[-1] // 2) if artifact.packed(name) else value.nbytes
        for name, value in artifact.constants.items()
    }


@dataclass(frozen=True)
class Size:
    """Bytes: the file, all its tensors at their widths, the weights' codes alone."""

    file: int
    tensors: int
    codes: int


def size(path: Path, artifact: Artifact) -> Size:
    stored = stored_bytes(artifact)
    codes = sum(count for name, count in stored.items() if name in artifact.quants)
    return Size(path.stat().st_size, sum(stored.values()), codes)


@dataclass(frozen=True)
class Difference:
    """One thing in which two artifacts differ."""

    where: str
    what: str


def differences(a: Artifact, b: Artifact) -> list[Difference]:
    """Model, recipe, profile and the rest of the header, then constants: codes that differ and by how much at most."""
    found = []
    for key in ("spec", "recipe", "profile", "nonlinear"):
        was, now = to_dict(getattr(a, key)), to_dict(getattr(b, key))
        found += differing_values(key, was, now)
    found += differing_values("hashes", a.meta.get("hashes", {}), b.meta.get("hashes", {}))
    for name in dict.fromkeys([*a.constants, *b.constants]):
        if name not in a.constants or name not in b.constants:
            found.append(Difference(name, f"only in the {'first' if name in a.constants else 'second'}"))
            continue
        x, y = a.constants[name], b.constants[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            found.append(Difference(name, f"{x.dtype} {x.shape} and {y.dtype} {y.shape}"))
        elif not np.array_equal(x, y):
            gap = np.abs(x.astype(np.float64) - y.astype(np.float64))
            found.append(Difference(name, f"{np.count_nonzero(gap)} of {x.size} differ, by {gap.max():.6g} at most"))
    return found


def differing_values(key: str, was: Any, now: Any) -> list[Difference]:
    if isinstance(was, dict) and isinstance(now, dict):
        names = dict.fromkeys([*was, *now])
        return [d for name in names for d in differing_values(f"{key}.{name}", was.get(name), now.get(name))]
    if was == now:
        return []
    short = [text if len(text := str(value)) <= 60 else f"{text[:57]}..." for value in (was, now)]
    return [Difference(key, f"{short[0]} and {short[1]}")]
