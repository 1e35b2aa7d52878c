"""What `qtx cost` does: one model's latency, memory and bytes, as it may run, or what an attention adds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.spec import Nonlinear, Recipe, SpecError, check_integer

from ..cost import compare
from ..cost.attention import attention_cost
from ..cost.compare import Variant, Workers
from ..cost.inputs import Counted, Random, choose_lengths, make_cells, write_calibration, write_cell
from ..data import DataError
from ..engines.backend import MissingExtra, backend
from ..engines.machine import Machine
from ..engines.protocols import Calibration, Data
from ..files.artifact import SUFFIX, Artifact, load_artifact, make_artifact, save_artifact
from ..files.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ..files.container import COST, FileError, check_writable, write_beside, write_sealed_json
from ..files.locks import hold, make_scratch
from ..files.profiles import read_profile
from ..progress import Progress
from ..recipes.named import resolve
from ..report.costs import (
    AttentionRow,
    CostResult,
    describe_costs,
    draw_cost,
    tabulate_attentions,
    tabulate_costs,
    tabulate_kernels,
)
from .opening import is_artifact, name_recipe, open_data
from .quantize import choose_recipe, prepare_checkpoint

NAMES = ("cost.json", "cost.txt", "cost.png")
SIZES, ROUNDS = (1, 8), 20


@dataclass(frozen=True)
class CostRequest:
    """A model, by its file or as a preset with first values, and what of it is measured."""

    checkpoint: Path | None = None  # or an artifact
    model: str | None = None  # a preset
    data: str | None = None  # None: the model's own, or random inputs
    tokenizer: Path | None = None
    recipe: str | None = None  # of fake quantization and integers; None: the checkpoint's own, or w8a8
    profile: str | None = None  # of integers: a name, or a .json file; None: qtx
    batches: tuple[int, ...] = SIZES  # sequences or images of a pass
    lengths: tuple[int, ...] | None = None  # tokens of a sequence; None: 64 and 128, as far as the model goes
    rounds: int = ROUNDS  # timed passes of each variant
    threads: int | None = None  # None: as the backend chooses
    backend: str = "torch"
    device: str = "cpu"
    compiled: bool = False  # integers compiled too, on torch
    engines: str = "auto"  # auto: those installed; none; or a comma list
    attentions: tuple[str, ...] | None = None  # what these add to vanilla, instead
    training: bool = False  # of attentions: training steps too
    out: Path | None = None  # a folder for NAMES


@dataclass(frozen=True)
class Costs:
    """All figures as JSON values, in words, and the names of the files that are then in the folder."""

    result: dict[str, Any]
    text: str
    written: list[str]


def measure_cost(request: CostRequest, tell: Callable[[str], None] = lambda words: None) -> Costs:
    """Runs the same model in float, under fake quantization, in integers and on other engines, all in turn.

    tell: is given, line by line, what is to be known before the figures, such as engines that are not installed.

    Raises:
        SpecError: options that do not go together, names that do not exist, or float32 that does not run.
        DataError: data that were named and cannot be had.
        FileError: the model cannot be read, or `out` holds results or cannot be written.
        MissingExtra: a backend or an engine that was named and is not installed.
    """
    check_request(request)
    with contextlib.nullcontext() if request.out is None else hold(request.out):
        check_out(request.out)
        backend(request.backend).check_machine(request.device, "float32")
        wanted = request.engines if request.attentions is None else "none"
        engines = compare.choose_engines(wanted, request.backend, request.device, tell)
        threads = request.threads or backend(request.backend).threads()
        workers = Workers(request.backend, request.device, threads)
        given = open_given(request)
        spec = given.stored.spec
        sizes = list(product(request.batches, choose_lengths(spec, request.lengths)))
        with make_scratch() as folder:
            if request.attentions is None:
                costs = measure_variants(workers, folder, given, sizes, request.rounds, engines, tell)
                text = "\n\n".join([tabulate_costs(costs), tabulate_kernels(costs), describe_costs(costs)])
                result = dict(costs)
            else:
                names, training = request.attentions, request.training
                rows = attention_cost(workers, spec, names, sizes, request.rounds, folder, training=training)
                result, text = {"attentions": rows}, tabulate_attentions(cast(list[AttentionRow], rows))
        path = None if request.checkpoint is None else str(request.checkpoint)
        result = {"checkpoint": path, "model": request.model, "rounds": request.rounds} | workers.common | result
        return Costs(result, text, [] if request.out is None else write(request.out, result, text))


def check_request(request: CostRequest) -> None:
    """Raises SpecError for options that do not go together."""
    if (request.checkpoint is None) == (request.model is None):
        raise SpecError("give a checkpoint or --model, one of them")
    if request.training and request.attentions is None:
        raise SpecError("--training belongs to --attention: give both")
    if request.compiled and (request.backend == "ref" or request.attentions is not None):
        wrong = "--attention" if request.attentions is not None else "--backend ref"
        raise SpecError(f"--compiled is of integers on --backend torch; leave it or {wrong} out")
    unused = request.recipe or request.profile or request.data or request.tokenizer
    if request.attentions is not None and unused:
        raise SpecError(f"{unused!r} does not belong to --attention, which quantizes nothing; leave it out")


def check_out(out: Path | None) -> None:
    """Raises FileError where the folder holds results already, or cannot be written."""
    if out is None:
        return
    for name in NAMES:
        if (out / name).exists():
            raise FileError(f"{out / name} exists: choose another --out")
        check_writable(out / name)


@dataclass(frozen=True)
class Given:
    """The model that was asked for, and its data; None, and the reason, where it has none."""

    path: Path | None
    stored: Checkpoint
    artifact: Artifact | None
    data: Data | None
    reason: str
    recipe: str | None
    profile: str | None
    compiled: bool  # integers too


def open_given(request: CostRequest) -> Given:
    """Raises SpecError, FileError or DataError where the model cannot be had, or data that were named cannot."""
    path, data, tokenizer = request.checkpoint, request.data, request.tokenizer
    chosen = request.recipe, request.profile
    asked = *chosen, request.compiled
    if path is None:
        spec = preset(str(request.model))
        if data is not None or tokenizer is not None:
            raise SpecError(f"--data {data or tokenizer}: --model {request.model} runs on random inputs; leave it out")
        return Given(path, Checkpoint(spec, init_params(spec, 0)), None, None, "a preset has no data", *asked)
    stored, artifact = open_either(path, *chosen)
    try:
        source = open_data(path, stored.spec, stored.meta, data, tokenizer)
    except (SpecError, DataError) as error:
        if data is not None or tokenizer is not None:
            raise
        return Given(path, stored, artifact, None, str(error), *asked)
    return Given(path, stored, artifact, source, "", *asked)


def open_either(path: Path, recipe: str | None, profile_name: str | None) -> tuple[Checkpoint, Artifact | None]:
    """A checkpoint; or an artifact's float parameters, and itself."""
    if is_artifact(path):
        if recipe or profile_name:
            name = f"--recipe {recipe}" if recipe else f"--profile {profile_name}"
            raise SpecError(f"{name}: {path} has its own; leave it out")
        artifact = load_artifact(path)
        return Checkpoint(artifact.spec, artifact.float_params(), meta=artifact.meta), artifact
    stored = load_checkpoint(path)
    if "diverged_at" in stored.meta:
        step = stored.meta["diverged_at"]
        raise FileError(f"{path}: training diverged at step {step}; no model is left to use")
    if stored.transforms:
        raise SpecError(
            f"{path} is made for the transforms of {name_recipe(stored)}, so float32 is not among what it can run: "
            f"give the float checkpoint that it was made from, and --recipe {name_recipe(stored)}"
        )
    return stored, None


def measure_variants(
    workers: Workers,
    folder: Path,
    given: Given,
    sizes: list[tuple[int, int]],
    rounds: int,
    engines: tuple[str, ...],
    tell: Callable[[str], None],
) -> CostResult:
    """Prepares the variants' files, compares them and times them."""
    spec, source = given.stored.spec, given.data
    for line in workers.run("ways").get("lines", ()) if given.compiled else ():
        tell(f"exact products of bytes here, {line}")
    if source is None:
        tell(f"random inputs and calibration, so that errors are not those of data: {given.reason}")
    cells = make_cells(spec, source, sizes)
    for cell in cells:
        write_cell(folder, cell)
        if source is not None and not cell.real:
            tell(f"{cell.name}: random inputs, as the evaluation data have none of this size")
    longest = max(cell.length for cell in cells)
    calibrating = source or Random(longest)
    variants, recipe = make_variants(workers, folder, given, calibrating)
    variants += compare.list_engine_variants(engines, variants[0].file, folder)
    masked, files = any(cell.padded for cell in cells), []
    if engines:
        files = write_calibration(folder, spec, calibrating, recipe.batches, longest, masked)
    compare.probe(workers, variants, cells, folder, masked, files)
    compare.measure(workers, variants, cells, folder, rounds)
    about = [{key: getattr(cell, key) for key in ("name", "batch", "length", "real", "padded")} for cell in cells]
    result = {"recipe": recipe.name, "cells": about, "variants": [describe_variant(variant) for variant in variants]}
    return cast(CostResult, result)


def make_variants(
    workers: Workers, folder: Path, given: Given, calibrating: Calibration
) -> tuple[list[Variant], Recipe]:
    """The variants that are ours, float32 first, their files written; and the recipe."""
    stored, spec = given.stored, given.stored.spec
    plain, fake, whole = folder / "float.safetensors", folder / "fake.safetensors", folder / f"model{SUFFIX}"
    save_checkpoint(plain, Checkpoint(spec, stored.params))  # without an optimizer's state
    variants = [Variant("float32", "float32", plain)]
    if workers.common["backend"] == "torch":
        variants.append(Variant("bfloat16", "bfloat16", plain))
    if given.artifact is not None and given.path is not None:
        recipe, params, ranges, transforms = given.artifact.recipe, stored.params, given.artifact.ranges(), {}
        integers = Variant("integers", "integer", given.path)
    else:
        meaning = read_profile(given.profile or "qtx")
        machine = Machine(str(workers.common["backend"]), str(workers.common["device"]))
        with Progress("calibrate", 0) as bar:
            recipe = choose_recipe(stored, given.recipe, None)
            prepared, _, _ = prepare_checkpoint(stored, machine, Counted(calibrating, bar), recipe)
        params, ranges, transforms = prepared.params, prepared.ranges, prepared.transforms
        integers = Variant("integers", "integer", whole)
        try:
            check_integer(resolve(recipe, spec), meaning, transforms=transforms)
            rewritten = replace(stored, params=params, transforms=transforms)
            save_artifact(whole, make_artifact(plain, rewritten, recipe, ranges, meaning, Nonlinear.TABLE, []))
        except SpecError as error:  # such as a recipe of small floats
            integers.finding = str(error)
    save_checkpoint(fake, Checkpoint(spec, params, {}, recipe, ranges, transforms=transforms))
    variants += [Variant("fake quantization", "fake", fake), integers]
    if given.compiled:
        file, finding = integers.file, integers.finding
        variants.append(Variant("integers, compiled", "integer-compiled", file, finding=finding))
    return variants, recipe


def describe_variant(variant: Variant) -> dict[str, Any]:
    """A variant as JSON values."""
    return {key: getattr(variant, key) for key in ("name", "bytes", "finding", "cells", "profile")}


def write(out: Path, result: Mapping[str, Any], text: str) -> list[str]:
    """Table, JSON and, with matplotlib, the picture; the names of what is there."""
    write_sealed_json(out / "cost.json", COST, result)
    write_beside(out / "cost.txt", (text + "\n").encode())
    if "variants" not in result:
        return ["cost.json", "cost.txt"]
    with contextlib.suppress(MissingExtra):
        draw_cost(out / "cost.png", cast(CostResult, result))
        return list(NAMES)
    return ["cost.json", "cost.txt"]
