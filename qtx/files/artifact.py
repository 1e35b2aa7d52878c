"""The artifact: a quantized model as integers, in one safetensors file that NumPy alone can run.

Tensors: the constants of `qtx_ref.integer.model`, by their names; weights of at most 4 bits two codes to a byte.
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

from qtx_ref.integer.lifting import float_params
from qtx_ref.integer.lowering import make_constants
from qtx_ref.integer.model import code_dtype
from qtx_ref.integer.products import pack_int4, unpack_int4
from qtx_ref.models.initial import shapes
from qtx_ref.spec import (
    ModelSpec,
    Nonlinear,
    Profile,
    QuantSpec,
    Range,
    Recipe,
    check_integer,
    from_dict,
    to_dict,
)

from .. import __version__
from ..data.splits import SHORT
from ..recipes.named import resolve
from .artifact_check import check_constants, check_size
from .checkpoint import Checkpoint
from .container import (
    ARTIFACT,
    VERSION,
    CheckpointError,
    read_sealed,
    sha_of,
    write_sealed,
)

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
    """A checkpoint in integers, which `check_integer` allows under these."""
    constants = make_constants(found.spec, found.params, resolve(recipe, found.spec), ranges, profile, nonlinear)
    hashes = {
        "checkpoint": sha_of(source),
        "recipe": sha_of_json(to_dict(recipe)),
        "calibration": sha_of_json(calibration),
    }
    kept = {key: found.meta[key] for key in ("data", "images", "tokenizer", "trained_on") if key in found.meta}
    if hashes_of := kept.get("data", {}).get("hashes"):  # what an evaluation must not meet, in short
        kept["data"] = kept["data"] | {"hashes": {"train": [h[:SHORT] for h in hashes_of.get("train", [])]}}
    meta = {"qtx": __version__, "hashes": hashes, "calibration": [h[:SHORT] for h in calibration], **kept}
    return Artifact(found.spec, recipe, profile, nonlinear, constants, meta)


def sha_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save_artifact(path: Path, artifact: Artifact) -> None:
    """Writes the file; an old one stays whole until the new one is."""
    tensors = {name: pack_int4(value) if artifact.packed(name) else value for name, value in artifact.constants.items()}
    header = {"format": ARTIFACT, "version": VERSION, "spec": to_dict(artifact.spec), "recipe": to_dict(artifact.recipe),
              "profile": to_dict(artifact.profile), "nonlinear": str(artifact.nonlinear), "meta": artifact.meta}  # fmt: skip
    write_sealed(path, header, tensors)


def load_artifact(path: Path) -> Artifact:
    """Reads a file that `save_artifact` wrote.

    Raises:
        CheckpointError: missing, empty, truncated, changed, of another format, or not what `lower` makes.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such artifact; make one with qtx quantize CHECKPOINT --out MODEL{SUFFIX}")
    header, tensors = read_sealed(path, ARTIFACT)
    try:
        artifact = Artifact(
            from_dict(ModelSpec, header["spec"]),
            from_dict(Recipe, header["recipe"]),
            from_dict(Profile, header["profile"]),
            from_dict(Nonlinear, header["nonlinear"]),
            tensors,
            header["meta"],
        )
        check_size(artifact.spec, tensors)
        check_integer(artifact.quants, artifact.profile)
        unpack(artifact)
        check_constants(artifact.spec, artifact.recipe, artifact.profile, artifact.nonlinear, tensors)
    except KeyError as error:
        raise CheckpointError(f"{path}: metadata lacks {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return artifact


def unpack(artifact: Artifact) -> None:
    """Codes of at most 4 bits to one a byte. Raises ValueError where they are not as many as the model's."""
    for name, shape in shapes(artifact.spec).items():
        if artifact.packed(name):
            try:
                codes = unpack_int4(artifact.constants[name], shape[-1], artifact.quants[name].symmetric)
            except ValueError as error:
                raise ValueError(f"constant {name}: {error}") from None
            artifact.constants[name] = codes.astype(code_dtype(artifact.quants[name]))


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
    """The header, then constants: how many numbers differ and by how much at most."""
    found = []
    for key in ("spec", "recipe", "profile", "nonlinear", "meta"):
        found += differing_values(key, to_dict(getattr(a, key)), to_dict(getattr(b, key)))
    for name in dict.fromkeys([*a.constants, *b.constants]):
        if name not in a.constants or name not in b.constants:
            found.append(Difference(name, f"only in the {'first' if name in a.constants else 'second'}"))
            continue
        x, y = a.constants[name], b.constants[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            found.append(Difference(name, f"{x.dtype} {x.shape} and {y.dtype} {y.shape}"))
        elif not np.array_equal(x, y):
            found.append(Difference(name, f"{np.count_nonzero(x != y)} of {x.size} differ, by {gap(x, y)} at most"))
    return found


def gap(x: np.ndarray, y: np.ndarray) -> str:
    """The largest difference; of integers exactly, also where it exceeds their dtype."""
    if x.dtype.kind == "f":
        return f"{np.abs(x.astype(np.float64) - y.astype(np.float64)).max():.6g}"
    high, low = np.maximum(x, y).astype(np.int64), np.minimum(x, y).astype(np.int64)
    return str((high.view(np.uint64) - low.view(np.uint64)).max())  # modulo 2^64, and below it


def differing_values(key: str, was: Any, now: Any) -> list[Difference]:
    """Where two JSON values differ: by key, by place in lists of equal length, long ones shortened."""
    if isinstance(was, dict) and isinstance(now, dict):
        found = []
        for name in dict.fromkeys([*was, *now]):
            if name in was and name in now:
                found += differing_values(f"{key}.{name}", was[name], now[name])
            else:
                found.append(Difference(f"{key}.{name}", f"only in the {'first' if name in was else 'second'}"))
        return found
    if isinstance(was, list) and isinstance(now, list):
        if len(was) != len(now):
            return [Difference(key, f"{len(was)} and {len(now)} entries")]
        pairs = enumerate(zip(was, now, strict=True))
        return [d for i, (one, other) in pairs for d in differing_values(f"{key}[{i}]", one, other)]
    if was == now:
        return []
    short = [text if len(text := str(value)) <= 60 else f"{text[:57]}..." for value in (was, now)]
    return [Difference(key, f"{short[0]} and {short[1]}")]
