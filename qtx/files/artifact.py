"""The artifact: a quantized model as integers, in one safetensors file that NumPy alone can run.

Tensors: the constants of `qtx_ref.integer.model`, by their names; weights of at most 4 bits two codes to a byte.
Metadata `qtx`: model, recipe, the whole profile, nonlinear functions, where it came from (sha256 of checkpoint, recipe
and calibration data) and a sha256 over all of it, which reading compares. In version 1 of the format, which qtx 0.1 and
0.2 wrote, the profile is flat; it is read as its records say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from qtx_ref.integer.converting import convert
from qtx_ref.integer.lifting import float_params
from qtx_ref.integer.lowering import make_constants
from qtx_ref.integer.model import code_dtype
from qtx_ref.integer.products import pack_int4, unpack_int4
from qtx_ref.models.initial import shapes
from qtx_ref.profiles import upgrade
from qtx_ref.quant.affine import code_limits
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
from ..recipes.named import resolve_integers
from .artifact_check import check_constants, check_size
from .checkpoint import Checkpoint
from .container import (
    ARTIFACT,
    VERSIONS,
    FileError,
    check_file,
    read_sealed,
    sha_of,
    write_sealed,
)
from .formats import JsonObject

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
    meta: JsonObject = field(default_factory=dict)

    @cached_property
    def quants(self) -> dict[str, QuantSpec]:
        """The quantizer of each site. Raises SpecError naming a site without integer codes."""
        return resolve_integers(self.recipe, self.spec)

    def ranges(self) -> dict[str, Range]:
        """The static ranges, as `FakeQuant` takes them."""
        ranges = {}
        for site, quant in self.quants.items():
            if not quant.dynamic and f"{site}.scale" in self.constants:
                scale, zero = self.constants[f"{site}.scale"], self.constants[f"{site}.zero_point"]
                low, high = code_limits(zero, quant)
                ranges[site] = Range(scale * (low - zero), scale * (high - zero), scale, zero)
        return ranges

    def float_params(self) -> dict[str, np.ndarray]:
        """The parameters that the codes stand for."""
        return float_params(self.spec, self.constants)

    def under(self, profile: Profile) -> Artifact:
        """The same codes and scales under another profile: multipliers and biases are derived anew. Raises SpecError
        naming the first site that cannot run under it."""
        constants = convert(self.spec, self.constants, self.quants, profile, self.nonlinear)
        return replace(self, profile=profile, constants=constants)

    def is_packed(self, name: str) -> bool:
        """Whether a constant is stored two codes to a byte: weights of at most 4 bits."""
        quant = self.quants.get(name)
        return quant is not None and quant.bits <= PACKED_BITS and name.endswith(".weight")


def make_artifact(
    source: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    ranges: Mapping[str, Range],
    profile: Profile,
    nonlinear: Nonlinear,
    calibration: Sequence[str],
) -> Artifact:
    """A checkpoint in integers.

    source: its file, whose hash the artifact keeps. ranges: of every static quantizer of the recipe. calibration: the
    hashes of the items that the ranges are from. Raises SpecError for what `check_integer` or lowering refuses.
    """
    spec = checkpoint.spec
    constants = make_constants(spec, checkpoint.params, resolve_integers(recipe, spec), ranges, profile, nonlinear)
    hashes = {
        "checkpoint": sha_of(source),
        "recipe": sha_of_json(to_dict(recipe)),
        "calibration": sha_of_json(list(calibration)),
    }
    meta = checkpoint.meta
    kept: JsonObject = {key: meta[key] for key in ("data", "images", "tokenizer", "trained_on") if key in meta}
    if items := kept.get("data", {}).get("hashes"):  # what an evaluation must not meet, in short
        train: list[str] = [h[:SHORT] for h in items.get("train", ())]
        data: JsonObject = kept["data"]
        kept["data"] = {**data, "hashes": {"train": train}}
    about = {"qtx": __version__, "hashes": hashes, "calibration": [h[:SHORT] for h in calibration], **kept}
    return Artifact(spec, recipe, profile, nonlinear, constants, about)


def sha_of_json(value: object) -> str:
    """The sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save_artifact(path: Path, artifact: Artifact) -> None:
    """Writes the file; an old one stays whole until the new one is."""
    tensors = {
        name: pack_int4(value) if artifact.is_packed(name) else value for name, value in artifact.constants.items()
    }
    header = {
        "format": ARTIFACT,
        "version": VERSIONS[ARTIFACT],
        "spec": to_dict(artifact.spec),
        "recipe": to_dict(artifact.recipe),
        "profile": to_dict(artifact.profile),
        "nonlinear": str(artifact.nonlinear),
        "meta": artifact.meta,
    }
    write_sealed(path, header, tensors)


def load_artifact(path: Path) -> Artifact:
    """Reads a file that `save_artifact` wrote.

    Raises:
        FileError: missing, empty, truncated, changed, of another format, or not what `lower` makes.
    """
    if path.is_dir():
        raise FileError(f"{path} is a folder, and no artifact; make one with qtx quantize {path} --out MODEL{SUFFIX}")
    check_file(path, f"no such artifact; make one with qtx quantize CHECKPOINT --out MODEL{SUFFIX}")
    header, tensors = read_sealed(path, ARTIFACT)
    try:
        artifact = Artifact(
            from_dict(ModelSpec, header["spec"]),
            from_dict(Recipe, header["recipe"]),
            from_dict(Profile, upgrade(header["profile"]) if header["version"] == 1 else header["profile"]),
            from_dict(Nonlinear, header["nonlinear"]),
            tensors,
            header["meta"],
        )
        check_size(artifact.spec, tensors)
        check_integer(artifact.quants, artifact.profile)
        unpack(artifact)
        check_constants(artifact.spec, artifact.recipe, artifact.profile, artifact.nonlinear, tensors)
    except KeyError as error:
        raise FileError(f"{path}: metadata lacks {error}") from None
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None
    return artifact


def unpack(artifact: Artifact) -> None:
    """Codes of at most 4 bits to one a byte. Raises ValueError where they are not as many as the model's."""
    for name, shape in shapes(artifact.spec).items():
        if artifact.is_packed(name):
            try:
                codes = unpack_int4(artifact.constants[name], shape[-1], artifact.quants[name].has_sign)
            except ValueError as error:
                raise ValueError(f"constant {name}: {error}") from None
            artifact.constants[name] = codes.astype(code_dtype(artifact.quants[name]))


# --- sizes and differences --------------------------------------------------------------------------------------------


def count_packed(shape: Sequence[int]) -> int:
    """Bytes of codes of at most 4 bits, two to a byte along the last axis."""
    return prod(shape[:-1]) * -(-shape[-1] // 2)


def count_constant_bytes(artifact: Artifact) -> dict[str, int]:
    """Bytes of each constant as the file holds it."""
    return {
        name: count_packed(value.shape) if artifact.is_packed(name) else value.nbytes
        for name, value in artifact.constants.items()
    }


@dataclass(frozen=True)
class Size:
    """Bytes: the file, all its tensors at their widths, the weights' codes alone."""

    file: int
    tensors: int
    codes: int


def measure_size(path: Path, artifact: Artifact) -> Size:
    """What the artifact, which is the file `path`, takes."""
    stored = count_constant_bytes(artifact)
    codes = sum(count for name, count in stored.items() if name in artifact.quants)
    return Size(path.stat().st_size, sum(stored.values()), codes)


@dataclass(frozen=True)
class Difference:
    """One thing in which two artifacts differ."""

    where: str
    what: str


def list_differences(a: Artifact, b: Artifact) -> list[Difference]:
    """The header, then constants: how many numbers differ and by how much at most."""
    differences: list[Difference] = []
    for key in ("spec", "recipe", "profile", "nonlinear", "meta"):
        differences += compare_values(key, to_dict(getattr(a, key)), to_dict(getattr(b, key)))
    for name in dict.fromkeys([*a.constants, *b.constants]):
        if name not in a.constants or name not in b.constants:
            differences.append(Difference(name, f"only in the {'first' if name in a.constants else 'second'}"))
            continue
        x, y = a.constants[name], b.constants[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            differences.append(Difference(name, f"{x.dtype} {x.shape} and {y.dtype} {y.shape}"))
        elif not np.array_equal(x, y):
            text = f"{np.count_nonzero(x != y)} of {x.size} differ, by {find_gap(x, y)} at most"
            differences.append(Difference(name, text))
    return differences


def find_gap(x: np.ndarray, y: np.ndarray) -> str:
    """The largest difference; of integers exactly, also where it exceeds their dtype."""
    if x.dtype.kind == "f":
        return f"{np.abs(x.astype(np.float64) - y.astype(np.float64)).max():.6g}"
    high, low = np.maximum(x, y).astype(np.int64), np.minimum(x, y).astype(np.int64)
    return str((high.view(np.uint64) - low.view(np.uint64)).max())  # modulo 2^64, and below it


def compare_values(key: str, was: object, now: object) -> list[Difference]:
    """Where two JSON values differ: by key, by place in lists of equal length, long ones shortened."""
    if isinstance(was, dict) and isinstance(now, dict):
        differences: list[Difference] = []
        for name in dict.fromkeys([*was, *now]):
            if name in was and name in now:
                differences += compare_values(f"{key}.{name}", was[name], now[name])
            else:
                differences.append(Difference(f"{key}.{name}", f"only in the {'first' if name in was else 'second'}"))
        return differences
    if isinstance(was, list) and isinstance(now, list):
        if len(was) != len(now):
            return [Difference(key, f"{len(was)} and {len(now)} entries")]
        pairs = enumerate(zip(was, now, strict=True))
        return [d for i, (one, other) in pairs for d in compare_values(f"{key}[{i}]", one, other)]
    if was == now:
        return []
    short = [text if len(text := str(value)) <= 60 else f"{text[:57]}..." for value in (was, now)]
    return [Difference(key, f"{short[0]} and {short[1]}")]
