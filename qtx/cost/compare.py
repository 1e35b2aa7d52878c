"""What a model costs to run: float, bfloat16, fake-quantized and in integers, beside other engines, measured in turn.

Every variant runs first in a process of its own: a crash there is a finding, its memory is that of the variant alone,
and its output is compared with float32 before anything is timed. Then one process times all that are left, interleaved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.spec import SpecError

from ..engines.backend import MissingExtra, need
from ..engines.process import EngineCrash, EngineRefusal, Worker, make_environment
from ..progress import Progress
from .inputs import Cell, cell_files
from .worker import WARM

ENGINES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "torch-dynamic": ("torch",)}  # and what they need
FLOAT_ERROR = 1e-3  # relative RMS beyond which a float32 engine computes something else
LIMIT = 1800  # seconds that one probe may take


@dataclass
class Variant:
    """One way to run the model: its worker's kind, and the file that it loads."""

    name: str
    kind: str
    file: Path
    source: Path | None = None  # of a file that an engine's tools make
    bytes: int | None = None
    finding: str | None = None  # why it is not timed
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)


# --- engines ----------------------------------------------------------------------------------------------------------


def choose_engines(text: str, backend_name: str, device: str, note: Callable[[str], None]) -> tuple[str, ...]:
    """The engines to run. `auto` takes those that are installed, and says of the others what to install.

    Raises SpecError for an unknown name or one that has no place here, MissingExtra for one named and not installed.
    """
    named = () if text in ("auto", "none") else tuple(part.strip() for part in text.split(",") if part.strip())
    for name in named:
        if name not in ENGINES:
            raise SpecError(f"--engines {name}: choose auto, none, or a list of {', '.join(ENGINES)}")
    if text == "none" or not (named or text == "auto"):
        return ()
    if backend_name != "torch" or device != "cpu":
        if named:
            raise SpecError(f"--engines {named[0]} runs beside --backend torch --device cpu; leave it out")
        return ()
    installed = []
    for name in named or ENGINES:
        try:
            for package in ENGINES[name]:
                need(package, "torch" if package == "torch" else "engines", f"engine {name}")
        except MissingExtra as error:
            if named:
                raise
            note(str(error))
        else:
            installed.append(name)
    return tuple(installed)


def list_engine_variants(engines: tuple[str, ...], plain: Path, folder: Path) -> list[Variant]:
    """The rows of the engines; `plain` is the float checkpoint."""
    variants = []
    if "onnxruntime" in engines:
        whole = folder / "model.onnx"
        variants.append(Variant("onnxruntime float32", "onnx", whole, plain))
        for how in ("dynamic", "static"):
            file = folder / f"model.{how}.onnx"
            variants.append(Variant(f"onnxruntime int8 {how}", f"onnx-{how}", file, whole))
    if "torch-dynamic" in engines:
        variants.append(Variant("torch int8 dynamic", "torch-dynamic", plain))
    return variants


# --- processes --------------------------------------------------------------------------------------------------------


class Workers:
    """Runs tasks of `qtx.cost.worker`, one process each, which ends with the call that started it."""

    def __init__(self, backend_name: str, device: str, threads: int) -> None:
        self.common = {"backend": backend_name, "device": device, "threads": threads}
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        self.environment = make_environment(**dict.fromkeys(names, str(threads)))

    def run(self, task: str, bar: Progress | None = None, **fields: Any) -> dict[str, Any]:
        """The task's result, or {"error": in a line what became of it}."""
        command = [sys.executable, "-m", "qtx.cost.worker"]
        message = {"task": task, **self.common, **fields}
        with Worker(command, self.environment) as worker:
            try:
                if bar is None:
                    result, _ = worker.call(message, {}, LIMIT)
                else:
                    result, _ = worker.call(message, {}, tell=bar.advance)
            except (EngineCrash, EngineRefusal) as error:
                return {"error": str(error)}
            return result


# --- comparing --------------------------------------------------------------------------------------------------------


def compare(output: np.ndarray, truth: np.ndarray, mask: np.ndarray | None) -> float:
    """RMS of the difference to float32 over RMS of float32 (the largest difference where that is 0).

    Of real tokens where outputs are one per token: output and truth (B, T, n) or (B, n), mask (B, T).
    """
    a, b = output.astype(np.float64), truth.astype(np.float64)
    if mask is not None and a.ndim == 3:
        a, b = a[mask], b[mask]
    scale = np.sqrt(np.mean(b**2))
    return float(np.sqrt(np.mean((a - b) ** 2)) / scale) if scale else float(np.abs(a - b).max())


def agree(answers: np.ndarray, truth: np.ndarray, samples: Sequence[Mapping[str, np.ndarray]]) -> float:
    """Share of equal answers, each the argmax of an output: (N, T) of real tokens of N sequences, or (N,)."""
    equal = answers == truth
    if equal.ndim == 2 and "mask" in samples[0]:
        equal = equal[np.concatenate([batch["mask"] for batch in samples])]
    return float(equal.mean())


def find_fault(output: np.ndarray, truth: np.ndarray) -> str | None:
    """Why an output is none that could be compared, in a line; None where it can."""
    if output.shape != truth.shape:
        return f"wrong output: shape {output.shape} for {truth.shape}"
    return None if np.isfinite(output).all() else "wrong output: NaN or infinity"


def probe(
    workers: Workers,
    variants: list[Variant],
    cells: list[Cell],
    folder: Path,
    masked: bool,
    calibration: list[Path],
) -> None:
    """Memory, error and kernels of every variant in every cell; float32 comes first. Findings go into the variants.

    Raises SpecError where float32 itself does not run.
    """
    rest: dict[str, int | None] = {}
    idle_kinds = dict.fromkeys("onnx" if v.kind.startswith("onnx") else "own" for v in variants)
    with Progress("compare", len(variants) * len(cells)) as bar:
        for kind in idle_kinds:
            rest[kind] = workers.run("idle", kind=kind).get("peak")
        for variant in variants:
            if variant.source is not None and variant.finding is None:
                given = [str(path) for path in calibration]
                made = workers.run(
                    "prepare",
                    kind=variant.kind,
                    source=str(variant.source),
                    file=str(variant.file),
                    masked=masked,
                    calibration=given,
                )
                variant.finding = made.get("error")
            if variant.finding is None:
                variant.bytes = variant.file.stat().st_size
            for i, cell in enumerate(cells):
                if variant.finding is None:
                    probe_cell(workers, variant, cell, folder, rest, last=i == len(cells) - 1)
                bar.advance(note=variant.name)
            if variant is variants[0] and variant.finding:
                raise SpecError(f"float32 does not run: {variant.finding}")


def probe_cell(
    workers: Workers, variant: Variant, cell: Cell, folder: Path, rest: Mapping[str, int | None], *, last: bool
) -> None:
    """One variant in one cell. Its answers to the cell's samples are compared with float32's."""
    truth, own = folder / f"{cell.name}.float32.npy", folder / f"{cell.name}.output.npy"
    right, answers = folder / f"{cell.name}.float32.answers.npy", folder / f"{cell.name}.answers.npy"
    output, answers = (own, answers) if truth.exists() else (truth, right)
    inputs, samples = cell_files(folder, cell)
    result = workers.run(
        "probe",
        kind=variant.kind,
        file=str(variant.file),
        cell=str(inputs),
        output=str(output),
        samples=[str(path) for path in samples],
        answers=str(answers),
        profile=last,
    )
    if "error" in result:
        variant.finding = result["error"]
        return
    actual, expected = np.load(output), np.load(truth)
    idle = rest["onnx" if variant.kind.startswith("onnx") else "own"]
    peak, cuda = result.pop("peak"), workers.common["device"] != "cpu" and not variant.kind.startswith("onnx")
    memory = peak if cuda else None if None in (peak, idle) else peak - idle
    variant.cells[cell.name] = {"memory": memory}
    variant.finding = find_fault(actual, expected)
    if variant.finding is None:
        error = compare(actual, expected, cell.inputs.get("mask"))
        variant.cells[cell.name] |= {"error": error}
        if cell.samples:
            share = agree(np.load(answers), np.load(right), cell.samples)
            variant.cells[cell.name] |= {"agreement": share, "compared": cell.batch * len(cell.samples)}
        if variant.kind == "onnx" and error > FLOAT_ERROR:
            variant.finding = f"wrong output: relative error {error:.2g} in float32"
    variant.profile |= result


# --- times ------------------------------------------------------------------------------------------------------------


def summarize(seconds: list[float], base: list[float], sequences: int, tokens: int) -> dict[str, float]:
    """Latency in seconds, throughput, and the median of each round's ratio to `base`, which ran in the same rounds."""
    median, p95 = np.percentile(seconds, [50, 95])
    return {
        "median": float(median),
        "p95": float(p95),
        "sequences_per_s": sequences / float(median),
        "tokens_per_s": tokens / float(median),
        "ratio": float(np.median(np.array(seconds) / np.array(base))),
    }


def measure(workers: Workers, variants: list[Variant], cells: list[Cell], folder: Path, rounds: int) -> None:
    """Times all variants without a finding, in turn, and writes the results into their cells.

    Raises SpecError where the process that times them fails.
    """
    alive = [variant for variant in variants if variant.finding is None]
    names = [variant.name for variant in alive]
    with Progress("time", len(names) * len(cells) * (rounds + WARM)) as bar:
        result = workers.run(
            "time",
            bar,
            rounds=rounds,
            variants={v.name: (v.kind, str(v.file)) for v in alive},
            cells={cell.name: (str(cell_files(folder, cell)[0]), names) for cell in cells},
        )
    if "error" in result:
        raise SpecError(f"the timed run failed ({result['error']}); leave out an engine with --engines")
    for cell in cells:
        seconds = result["seconds"][cell.name]
        for variant in alive:
            times = summarize(seconds[variant.name], seconds[names[0]], cell.batch, cell.batch * cell.length)
            variant.cells[cell.name] |= times | {"seconds": seconds[variant.name]}
