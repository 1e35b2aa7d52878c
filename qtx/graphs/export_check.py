"""An exported file held to the reference: every code of every site, in onnxruntime at each level and in ONNX's own
evaluator.

Free: the file runs as it is. Forced, for the form with float kernels: every node that reads a site's codes is given
the reference's, so that a difference is of the node that makes it. What must be equal is every code of the integer
form; and forced, every code that a quantizer or a product with its requantization gives. Where an engine multiplies in
float32 instead of integers, a code may differ whose exact value lies within the error of that sum of a tie: it is
counted as near.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.backend import IntegerModel
from qtx_ref.quant import affine
from qtx_ref.random import stream
from qtx_ref.spec import Family, ModelSpec, QuantizeRule, SpecError

from ..files.artifact import Artifact, load_artifact
from ..files.container import FileError, sha_of
from .export import SUFFIX, make_model
from .export_graph import Value, need_onnx
from .export_qdq import QdqGraph
from .export_run import GIVEN, Arrays, expose, force, list_engines, run_engine
from .export_wiring import Wiring

ROWS, TOKENS = 2, 32  # of the batch that a check runs on
INPUT = "embed.image"  # quantized from what the model is given


@dataclass(frozen=True)
class SiteCheck:
    """One site in one engine. exact: its codes must be equal; forced and near are None in the integer form."""

    site: str
    codes: int
    exact: bool
    free: int  # codes that differ
    forced: int | None
    near: int | None  # of those that differ when forced
    worst: int  # the largest difference: when forced, or in the integer form


@dataclass(frozen=True)
class EngineCheck:
    """One engine. exposing: its output is the same whether or not the sites are outputs too."""

    engine: str
    sites: tuple[SiteCheck, ...]
    exposing: bool

    @property
    def equal(self) -> bool:
        """Whether everything is as it must be."""
        return self.exposing and not self.count()[1]

    def count(self) -> tuple[int, int, int, int, int, int, int]:
        """Codes that must be equal, how many are not, and how many differ near a tie; codes of float kernels, how many
        they flip when fed the reference's, and by how much at most; all that flip when the file runs freely."""
        exact = [site for site in self.sites if site.exact]
        others = [site for site in self.sites if not site.exact]
        near = sum(site.near or 0 for site in exact)
        differ = sum(site.free if site.forced is None else site.forced for site in exact) - near
        flips, worst = sum(site.forced or 0 for site in others), max((site.worst for site in others), default=0)
        codes = (sum(site.codes for site in part) for part in (exact, others))
        return next(codes), differ, near, next(codes), flips, worst, sum(s.free for s in self.sites)


def check_export(
    path: Path, file: Path, batch: Arrays | None = None, engines: tuple[str, ...] = ()
) -> Iterator[EngineCheck]:
    """The ONNX file of the artifact `path`, in one engine after another.

    batch: as `qtx.data` has them; None: random. engines: of `list_engines`; none: all of them. Raises FileError for a
    file that is not of this artifact, MissingExtra without onnx, or onnxruntime where it is asked for.
    """
    onnx = need_onnx()
    if not file.is_file():
        raise FileError(f"{file}: no such file; make it with qtx export {path} --format onnx --out MODEL{SUFFIX}")
    model = onnx.load(str(file))
    about = read_about(file, model)
    if about["artifact"] != sha_of(path):
        raise FileError(f"{file} was not exported from {path}: its sha256 of the artifact is another")
    artifact = load_artifact(path)
    yield from check_model(artifact, model, about["form"], batch, engines)


def read_about(file: Path, model: Any) -> dict[str, Any]:
    """What a file says of itself. Raises FileError where it is not one of ours."""
    for entry in model.metadata_props:
        if entry.key == "qtx":
            about: dict[str, Any] = json.loads(entry.value)
            return about
    raise FileError(f"{file}: its metadata has no entry qtx: only files of qtx export can be checked")


def check_model(
    artifact: Artifact, model: Any, form: str, batch: Arrays | None = None, engines: tuple[str, ...] = ()
) -> Iterator[EngineCheck]:
    """A model of `make_model` in each engine. Raises SpecError for an engine that is not known."""
    for engine in engines:
        if engine not in list_engines():
            raise SpecError(f"engine {engine}: choose of {', '.join(list_engines())}")
    _, wiring = make_model(artifact, form)
    batch = random_batch(artifact.spec) if batch is None else batch
    want = run_reference(artifact, wiring, batch)
    sites = {site: value for site, value in wiring.sites.items() if site in want}
    inputs = {name: np.ascontiguousarray(batch[name]) for name in wiring.inputs}
    exposed = expose(wiring.graph, model, sites.values())
    entries = wiring.session()
    for engine in engines or list_engines():
        plain = run_engine(engine, model, inputs, entries)["output"]
        free = run_engine(engine, exposed, inputs, entries)
        flips = {site: count_different(free[value.name], want[site])[0] for site, value in sites.items()}
        if isinstance(wiring, QdqGraph):
            rows = check_forced(engine, wiring, exposed, inputs, sites, want, flips)
        else:
            counts = {site: count_different(free[value.name], want[site]) for site, value in sites.items()}
            rows = [SiteCheck(site, want[site].size, True, n, None, None, by) for site, (n, by) in counts.items()]
        yield EngineCheck(engine, tuple(rows), bool(np.array_equal(plain, free["output"])))


def check_forced(
    engine: str,
    wiring: QdqGraph,
    exposed: Any,
    inputs: Arrays,
    sites: Mapping[str, Value],
    want: Arrays,
    flips: Mapping[str, int],
) -> list[SiteCheck]:
    """Each site when what it is made of is the reference's."""
    given = force(wiring.graph, exposed, sites.values())
    fed = dict(inputs) | {GIVEN + value.name: want[site].astype(value.dtype) for site, value in sites.items()}
    read = {value.name for value in given.graph.input}
    forced = run_engine(engine, given, {name: x for name, x in fed.items() if name in read}, wiring.session())
    pairs = expect_pairs(wiring, want)
    rows = []
    for site, value in sites.items():
        got, product = forced[value.name], site in wiring.multipliers
        wrong, worst = count_different(got, pairs.get(site, want[site]))
        near = count_near(wiring, site, got, want) if wrong and product else 0
        exact = product or site in pairs or site == INPUT
        rows.append(SiteCheck(site, want[site].size, exact, flips[site], wrong, near, worst))
    return rows


def random_batch(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """Random images, or tokens of which the last row ends early."""
    rng = stream(seed, "export check")
    if spec.family is Family.VIT:
        size = (ROWS, spec.channels, spec.image_size, spec.image_size)
        return {"images": rng.normal(size=size).astype(np.float32)}
    tokens = rng.integers(0, spec.vocab, (ROWS, min(TOKENS, spec.length)))
    mask = np.ones(tokens.shape, bool)
    mask[-1, -(tokens.shape[1] // 3) :] = False
    return {"tokens": tokens, "mask": mask, "types": rng.integers(0, max(spec.types, 1), tokens.shape)}


def run_reference(artifact: Artifact, wiring: Wiring, batch: Arrays) -> dict[str, np.ndarray]:
    """The codes of every site, and the accumulators, in the reference's integers under the file's profile; products
    requantized by the file's own scales."""
    constants = dict(wiring.constants)
    if isinstance(wiring, QdqGraph):
        constants |= {f"{site}.multiplier": np.asarray(real) for site, real in wiring.multipliers.items()}
    model = IntegerModel(artifact.spec, constants, artifact.quants, wiring.profile)
    record: dict[str, np.ndarray] = {}
    model.run(batch, lambda site, value: record.__setitem__(site, value))
    return record


def expect_pairs(wiring: QdqGraph, want: Arrays) -> dict[str, np.ndarray]:
    """What codes read and quantized again give, by the reference's two functions."""
    rule: QuantizeRule = wiring.profile.quantize
    by_name = {value.name: site for site, value in wiring.sites.items()}
    codes = {}
    for site, x in wiring.pairs.items():
        if x.name in by_name:
            source, y = want[by_name[x.name]], wiring.sites[site]
            real = affine.dequantize(source, np.asarray(x.unit), np.asarray(x.zero_point), wiring.profile.dequantize)
            code = affine.quantize(real, np.asarray(y.unit), np.asarray(y.zero_point), y.spec, rule)
            first = want[site][:, : want[site].shape[1] - code.shape[1]]  # a token that was put in front
            codes[site] = np.concatenate([first, code], axis=1) if first.size else code
    return codes


def count_different(got: np.ndarray, want: np.ndarray) -> tuple[int, int]:
    """How many codes differ, and by how much at most; all of them where the shapes do."""
    if got.shape != want.shape:
        return want.size, int(np.abs(want.astype(np.int64)).max(initial=0))
    apart = np.abs(got.astype(np.int64) - want.astype(np.int64))
    return int((apart > 0).sum()), int(apart.max(initial=0))


def count_near(wiring: QdqGraph, site: str, got: np.ndarray, want: Arrays) -> int:
    """Of the codes of a product that differ, those by 1 whose exact value is as near to a tie as a float32 sum may err.

    The sum of n products is off by at most (n + 8) 2^-24 times the sum of magnitudes: n roundings of the sum with its
    bias, one of each operand, of their product and of the bias as they are dequantized, one of the quantizer's
    division, two of the factor that the exact value is scaled with, and one for what is of second order.
    """
    a, b = (load_operand(wiring, value, want) for value in wiring.operands[site])
    if wiring.operands[site][1].name.endswith("embed.token.weight"):
        b = np.swapaxes(b, -1, -2)
    real = np.float64(wiring.multipliers[site])
    zero, spec = np.int64(wiring.sites[site].zero_point), wiring.sites[site].spec
    exact, size = a @ b, np.abs(a) @ np.abs(b)
    bias = wiring.constants.get(f"{site}.bias")
    if bias is not None:
        exact, size = exact + bias.reshape(-1), size + np.abs(bias.reshape(-1).astype(np.float64))
    exact, size = exact * real, size * real
    if site.endswith(".context"):  # (B, H, T, K) -> (B, T, H K)
        exact, size = (x.transpose(0, 2, 1, 3).reshape(got.shape) for x in (exact, size))
    reach = (a.shape[-1] + 8) * 2.0**-24 * size
    low, high = (np.clip(np.rint(exact + way * reach) + zero, spec.code_min, spec.code_max) for way in (-1, 1))
    return int(((got != want[site]) & (got >= low) & (got <= high)).sum())


def load_operand(wiring: QdqGraph, value: Value, want: Arrays) -> np.ndarray:
    """Codes less their zero point, float64, as they enter a product."""
    if value.name in wiring.graph.constants:
        code = wiring.graph.constants[value.name]
    else:
        code = trace_back(wiring, value.name, want)
    return code.astype(np.float64) - np.float64(value.zero_point)


def trace_back(wiring: QdqGraph, name: str, want: Arrays) -> np.ndarray:
    """The reference's codes of a value that is a site's, or an arrangement of one."""
    for site, value in wiring.sites.items():
        if value.name == name:
            return want[site]
    node = next(node for node in wiring.graph.nodes if name in node.output)
    x = trace_back(wiring, node.input[0], want)
    if node.op_type == "Transpose":
        return x.transpose(node.attribute[0].ints)
    if node.op_type == "Gather":
        return x[:, 0]
    sizes = wiring.graph.constants[node.input[1]]
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(sizes)])
