"""What `qtx ptq` does: the remedies of post-training quantization, chosen by name and compared on one model."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from qtx_ref.spec import Head, ModelSpec, SpecError

from ..data import splits
from ..engines.backend import MissingExtra
from ..files.checkpoint import file_of
from ..files.container import CHECKPOINT, COMPARISON, FileError, check_writable, open_sealed, sha_of
from ..files.locks import hold
from ..files.results import RecipeRow
from ..measure.damage import check_spared
from ..recipes import remedies
from ..recipes.named import recipe, resolve
from ..report.ptq import draw_rows
from ..runs.reading import RunSpec
from .comparison import RESULTS, Comparison, PtqSpec, kept_name
from .opening import open_checkpoint, open_data, refuse_transformed
from .resolving import change_data, make_machine

PICTURE = "ptq.png"
SEQUENCES, CALIBRATION = 512, 8
READ = ("data", "machine", "quant.recipes")  # of a run


@dataclass(frozen=True)
class PtqRequest:
    """A float checkpoint, the recipes to compare, and the folder for what comes out."""

    checkpoint: Path
    out: Path  # for ptq.json, ptq.png and the models that are kept
    run: RunSpec = field(
        default_factory=RunSpec
    )  # its data, its machine, and quant.recipes: the standard ones unless said
    skip: tuple[str, ...] = ()  # patterns of recipes that are left out
    also: tuple[str, ...] = ()  # recipes beside these
    sequences: int = SEQUENCES  # of the evaluation split
    calibration: int = CALIBRATION  # batches of the calibration split
    sensitivity: str | None = None  # a recipe of which one site is quantized at a time, instead
    keep: tuple[str, ...] = ()  # recipes whose models are left in the folder
    spare: tuple[str, ...] = ()  # kinds of tokens whose part of the damage is measured: `damage.SPARED`
    seed: int = 0  # of the bootstrap
    resume: bool = False

    @property
    def recipes(self) -> tuple[str, ...]:
        """The recipes that are named; none: the standard ones."""
        return self.run.get("quant.recipes", ())


def compare_recipes(request: PtqRequest) -> tuple[Comparison, list[str]]:
    """Measures a row for each recipe, or ranks the sites of one.

    Returns the comparison, with `rows` or `sites` as JSON values, and the names of the files that are then in `out`.

    Raises:
        SpecError: a recipe that does not exist or fit, options that do not go together, a model without a task, or one
            that diverges in float.
        DataError: data that cannot be had, do not fit, or trained the model.
        FileError: the checkpoint cannot be read, or `out` holds something else, or is held by another process.
        MissingExtra: a backend or tokenizer whose package is not installed.
    """
    out = request.out
    with hold(out):
        run, machine = request.run, make_machine(request.run)
        run.refuse(READ, "qtx ptq takes keys of data and machine, and quant.recipes, alone")
        machine.check()
        if request.sensitivity:
            refuse_beside(request)
        stored = open_checkpoint(request.checkpoint)
        if stored.spec.head is Head.NONE:
            raise SpecError(
                f"{request.checkpoint} has no head, so no task to compare on: give it one with qtx finetune"
            )
        refuse_transformed(stored, str(request.checkpoint))
        check_spared(stored.spec, request.spare)
        chosen = choose_recipes(request, stored.spec)
        files = name_files(request.keep)
        for name in chosen:
            resolve(recipe(name, stored.spec), stored.spec)
        sha256 = sha_of(file_of(request.checkpoint))
        check_out(out, request.resume, files, sha256)
        about, name = change_data(stored.meta, run), run.get("data.tokenizer")
        tokenizer = None if name is None else Path(name)
        data = open_data(request.checkpoint, stored.spec, stored.meta, about, tokenizer)
        for split in ("evaluation", "calibration"):
            splits.refuse_overlap(stored.meta, data, split)
        spec = PtqSpec(chosen, request.sequences, request.calibration, request.seed, machine, request.spare)
        identity = {"checkpoint": sha256} | {split: data.fingerprint(split) for split in ("calibration", "evaluation")}
        comparison = Comparison(spec, stored, data, out, identity, resume=request.resume)
        if request.sensitivity:
            comparison.sensitivity(request.sensitivity)
            return comparison, [RESULTS]
        comparison.run(request.keep)
        written = [RESULTS, *(name for name in files if (out / name).exists())]
        return comparison, written + draw(request, comparison)


def refuse_beside(request: PtqRequest) -> None:
    """Raises SpecError where a sensitivity is asked for and recipes are named too."""
    for option in ("recipes", "skip", "also", "keep", "spare"):
        if value := getattr(request, option):
            raise SpecError(f"--sensitivity {request.sensitivity} and --{option} {','.join(value)}: give one of them")


def choose_recipes(request: PtqRequest, spec: ModelSpec) -> tuple[str, ...]:
    """The names of the recipes to compare. Raises SpecError for none, one named twice, or one to keep
    that is not among them."""
    if request.sensitivity:
        chosen: tuple[str, ...] = (request.sensitivity,)
    else:
        chosen = request.recipes or remedies.list_standard(spec)
    chosen = tuple(name for name in chosen if not any(fnmatch.fnmatch(name, p) for p in request.skip))
    chosen += request.also
    if not chosen or len(set(chosen)) < len(chosen):
        raise SpecError(f"recipes are {','.join(chosen)!r}: name at least one, each once")
    if strange := [name for name in request.keep if name not in chosen]:
        raise SpecError(f"--keep {strange[0]}: it is not among the recipes compared; add it to --recipes")
    return chosen


def name_files(keep: Sequence[str]) -> list[str]:
    """The file of each model that is kept. Raises SpecError where two would have one name."""
    files = [kept_name(name) for name in keep]
    if twice := [name for name in files if files.count(name) > 1]:
        raise SpecError(f"--keep {','.join(keep)}: two recipes would be left as {twice[0]}; rename one")
    return files


def check_out(out: Path, resume: bool, kept: Sequence[str], sha256: str) -> None:
    """Raises FileError where the folder cannot take the results, or has a file of that name that is not of a
    comparison of the checkpoint with this sha256. kept: files of models."""
    if (out / RESULTS).exists() and not resume:
        raise FileError(f"{out / RESULTS} exists: go on with --resume, or choose another --out")
    check_writable(out / RESULTS, COMPARISON)
    for name in kept:
        check_writable(out / name, CHECKPOINT)
        if (out / name).exists():
            with open_sealed(out / name, CHECKPOINT) as (header, _):
                if not resume or header.get("meta", {}).get("quantized_from") != sha256:
                    raise FileError(f"{out / name} exists: choose another --out")


def draw(request: PtqRequest, comparison: Comparison) -> list[str]:
    """Draws the rows; the picture's name, or none and on stderr the reason."""
    count = len(comparison.plain.answers.count)
    about = f"{count} sequences, {request.calibration} calibration batches of {splits.BATCH}"
    title = f"qtx ptq: {request.checkpoint}, {about}"
    try:
        draw_rows(request.out / PICTURE, comparison.kind, cast(Mapping[str, RecipeRow], comparison.rows), title)
    except (MissingExtra, FileError) as error:
        print(f"no picture: {error}", file=sys.stderr)
        return []
    return [PICTURE]
