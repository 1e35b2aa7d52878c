"""The main job: train the same model with several attentions under equal conditions, quantize each, compare.

The table is that of Bondarenko et al. 2023: float perplexity (or accuracy), max inf norm, average kurtosis, quantized
perplexity, and the degradation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from qtx_ref.presets import attention, preset
from qtx_ref.spec import ModelSpec, SpecError, from_dict, to_dict

from ..data import TextData, load, unigram_perplexity
from ..data.splits import BATCH
from ..engines.backend import MissingExtra
from ..engines.machine import Machine, identify_machine
from ..engines.protocols import Batch
from ..files.checkpoint import Checkpoint, load_checkpoint
from ..files.container import STUDY, FileError, check_writable, write_sealed_json
from ..files.locks import LOCK, hold
from ..files.results import read_study
from ..files.writing import check_space
from ..measure.history import History
from ..measure.outliers import measure_outliers
from ..measure.published import make_column
from ..measure.scores import evaluate, metric, to_json_values
from ..measure.sizes import count_stored_bytes, ranges_json
from ..prepare.calibration import CALIBRATION_SEED, bind, calibration_batches
from ..prepare.prepare import prepare
from ..recipes.named import recipe, resolve, training_recipe
from ..report.plots import draw_curves
from ..report.tables import DIVERGED, format_number, format_spread, format_table
from .run import PER_STEP, STEPS, TrainSpec, checkpoint_bytes, describe_difference, watch_integer
from .training import default_optim, fit_vocabulary, train

OUTLIER_BATCHES = 16  # evaluation batches behind inf norm and kurtosis


@dataclass(frozen=True)
class StudySpec:
    """Everything that a study's numbers depend on."""

    model: str = "opt-tiny"
    data: str | None = None  # None: the bundled books, or digits for images
    tokenizer: str | None = None
    vocab: int | None = None  # of a tokenizer trained here
    steps: int = STEPS
    batch: int = PER_STEP  # sequences or images per step
    lr: float | None = None  # None: the preset's
    attention: tuple[str, ...] = ("vanilla", "clipped", "gated")
    recipes: tuple[str, ...] = ("w8a8",)
    train_quant: str | None = None
    watch_integer: int | None = None  # steps between runs of the current model in integers
    seeds: tuple[int, ...] = (0,)
    machine: Machine = Machine()


def run_name(kind: str, train_quant: str | None) -> str:
    """A run's row in the table."""
    return f"{kind}-FQ" if train_quant else kind


class Study:
    """A study in a folder: `study.json`, one checkpoint per run in `<run>-seed<N>/`, `curves.png`."""

    def __init__(self, spec: StudySpec, out: Path, *, resume: bool) -> None:
        """Checks everything before any training.

        Raises:
            SpecError, DataError: a name or number that does not exist.
            FileError: `out` holds a study, and `resume` is not set or it is another one.
        """
        self.spec, self.out, self.resume = spec, out, resume
        for name, given in (("--attention", spec.attention), ("--bits", spec.recipes)):
            if not given or len(set(given)) < len(given):
                raise SpecError(f"{name} is {','.join(given)!r}: name at least one, each once")
        base = preset(spec.model)
        self.models = {kind: replace(base, attention=attention(kind)) for kind in spec.attention}
        for model in self.models.values():
            for name in spec.recipes:
                recipe(name, model)
            if spec.train_quant:
                training_recipe(spec.train_quant, model)
        self.optim = default_optim(base, spec.steps, spec.lr)
        self.path = out / "study.json"
        known = None
        if self.path.exists():
            known = self._read()
        elif out.is_dir() and any(item.name != LOCK for item in out.iterdir()) and not resume:
            raise FileError(f"{out} is not empty: go on with --resume, or choose another --out")
        check_writable(self.path)
        spec.machine.check()
        self._check_space({} if known is None else known["runs"])
        self.data = load(spec.data, base, tokenizer=Path(spec.tokenizer) if spec.tokenizer else None, vocab=spec.vocab)
        self.models = {kind: fit_vocabulary(model, self.data) for kind, model in self.models.items()}
        self.conditions = {"data": self.data.describe(), "threads": identify_machine(spec.machine)["threads"]}
        first = self.models[spec.attention[0]]
        self.unigram = unigram_perplexity(self.data, first, 0, BATCH) if isinstance(self.data, TextData) else None
        self.runs: dict[str, dict[str, Any]] = {}
        if known is not None:
            for key, value in self.conditions.items():
                if known.get(key) != value:
                    words = describe_difference(key, known.get(key), value)
                    raise FileError(f"{self.path} is another study: {words}")
            self.runs = known["runs"]

    def names(self) -> dict[str, tuple[int, str | None, str]]:
        """Its runs by name: seed, recipe of training, attention."""
        recipes = [None, *([self.spec.train_quant] if self.spec.train_quant else [])]
        kinds = product(self.spec.seeds, recipes, self.spec.attention)
        return {f"{run_name(kind, quant)}-seed{seed}": (seed, quant, kind) for seed, quant, kind in kinds}

    def _check_space(self, done: Mapping[str, Any]) -> None:
        """Raises WriteError where the disk has no room for the checkpoints of the runs that are not done."""
        sizes = {
            kind: checkpoint_bytes(model, self.optim, self.spec.machine.dtype) for kind, model in self.models.items()
        }
        check_space(self.path, sum(sizes[kind] for name, (_, _, kind) in self.names().items() if name not in done))

    def run(self) -> None:
        """Trains and evaluates every run that is not finished. `study.json` is written after each.

        Raises FileError where another process holds the folder, and what `train` raises.
        """
        with hold(self.out):
            for name, (seed, quant, kind) in self.names().items():
                if name not in self.runs:
                    self.runs[name] = self._one(name, kind, self.models[kind], seed, quant)
                    self.save()
            self.save()
            self._draw()

    def _draw(self) -> None:
        self.written = ["study.json", "a checkpoint per run"]
        lost = {name: " (diverged)" if run["diverged"] else "" for name, run in self.runs.items()}
        histories = {name + lost[name]: self._history(name) for name in self.runs}
        try:
            about = f"{self.spec.data or 'bundled data'}, {self.spec.steps} steps of batch {self.spec.batch}"
            draw_curves(self.out / "curves.png", histories, f"qtx study: {self.spec.model} on {about}")
            self.written.append("curves.png")
        except (MissingExtra, FileError) as error:
            print(f"no picture: {error}", file=sys.stderr)

    def result(self) -> dict[str, Any]:
        """What `study.json` holds."""
        about = {"calibration_seed": CALIBRATION_SEED, "unigram_perplexity": self.unigram, "runs": self.runs}
        return {"spec": to_dict(self.spec), **self.conditions, **about}

    def save(self) -> None:
        """Writes `study.json`. Raises WriteError where that cannot be."""
        write_sealed_json(self.path, STUDY, self.result())

    def tabulate(self) -> str:
        """The table; several seeds give mean and sample standard deviation."""
        kind = metric(self.models[self.spec.attention[0]])
        unit = "acc %" if kind == "accuracy" else "ppl"
        header = ["attention", f"FP {unit}", "max inf norm", "avg kurtosis"]
        if self.spec.train_quant:
            header.append(f"as trained {unit}")
        for name in self.spec.recipes:
            header += [f"{name.upper() if name.startswith('w') else name} {unit}", "degradation"]
        order = [
            (quant, attention_name)
            for quant in [None] + ([self.spec.train_quant] if self.spec.train_quant else [])
            for attention_name in self.spec.attention
        ]
        configurations = [(attention(name), self._train_recipe(name, quant)) for quant, name in order]
        beside, sources = make_column(self.spec.model, configurations, self.spec.recipes)
        if sources:
            header.append("published")
        rows = []
        for (quant, attention_name), figures in zip(order, beside, strict=True):
            name = run_name(attention_name, quant)
            runs = [self.runs[f"{name}-seed{seed}"] for seed in self.spec.seeds]
            lost = sum(run["diverged"] for run in runs)
            label = name + (f" (diverged{f' {lost} of {len(runs)}' if len(runs) > 1 else ''})" if lost else "")
            rows.append([label, *self._cells(runs, kind), *([figures] if sources else [])])
        lines = [format_table(header, rows), *sources]
        if self.unigram is not None:
            lines.append(f"unigram model on the same targets: perplexity {format_number(self.unigram)}")
        return "\n".join(lines)

    def _train_recipe(self, kind: str, quant: str | None) -> str | None:
        """The name of the recipe that `train_quant` stands for."""
        return training_recipe(quant, self.models[kind]).name if quant else None

    def _cells(self, runs: Sequence[dict[str, Any]], kind: str) -> list[str]:
        def values(*keys: str) -> list[float | None]:
            collected = []
            for run in runs:
                scores: Any = run
                for key in keys[:-1]:
                    scores = None if scores is None else scores.get(key)
                value = None if scores is None else scores.get(keys[-1])
                collected.append(math.inf if value is None and keys[-1] in (scores or {}) else value)  # was not finite
            return collected

        float_scores = values("float", kind)
        cells = [format_spread(float_scores), format_spread(values("outliers", "max_inf_norm"), 2)]
        cells.append(format_spread(values("outliers", "average_kurtosis"), 2))
        if self.spec.train_quant:
            cells.append(format_spread(values("trained", kind)))
        for name in self.spec.recipes:
            scores = values("recipes", name, kind)
            cells.append(format_spread(scores))
            lost = [degradation(kind, *pair) for pair in zip(float_scores, scores, strict=True)]
            cells.append(format_spread(lost, 2))
            cells[-1] += "" if cells[-1] in ("-", DIVERGED) else " pt" if kind == "accuracy" else " %"
        return cells

    def _one(self, name: str, kind: str, model: ModelSpec, seed: int, quant: str | None) -> dict[str, Any]:
        machine = self.spec.machine
        path = self.out / name / "model.safetensors"
        watch = watch_integer(self.spec.watch_integer)
        run = TrainSpec(model, self.optim, self.spec.batch, seed, quant, evaluation=watch)
        checkpoint = train(run, self.data, path, machine, resume=self.resume or path.exists(), label=name)
        result: dict[str, Any] = {
            "attention": kind,
            "train_quant": quant,
            "seed": seed,
            "checkpoint": str(path.relative_to(self.out)),
            "diverged": checkpoint.meta["diverged"],
            "float": None,
            "outliers": None,
            "float_bytes": None,
            "trained": None,
            "recipes": {},
            "watch": History.of(checkpoint.extra).watched(),
        }
        if "diverged_at" not in checkpoint.meta:
            self._measure(result, checkpoint, f"{name} evaluate")
        return result

    def _measure(self, result: dict[str, Any], checkpoint: Checkpoint, label: str) -> None:
        model = self.spec.machine.model(checkpoint.spec, checkpoint.params)
        total = sum(1 for _ in self._evaluation(checkpoint.spec))
        result["float"] = to_json_values(evaluate(model, self._evaluation(checkpoint.spec), label, total))
        result["float_bytes"] = count_stored_bytes(checkpoint.params, {}, {})
        result["outliers"] = to_json_values(measure_outliers(model, self._evaluation(checkpoint.spec, OUTLIER_BATCHES)))
        if result["train_quant"] and checkpoint.recipe is not None:
            bind(model, checkpoint.recipe, checkpoint.ranges)
            trained = evaluate(model, self._evaluation(checkpoint.spec), f"{label} as trained", total)
            result["trained"] = to_json_values(trained)
        for name in self.spec.recipes:
            chosen = recipe(name, checkpoint.spec)
            batches = calibration_batches(self.data, checkpoint.spec)
            try:
                prepared = prepare(self.spec.machine, checkpoint.spec, checkpoint.params, batches, chosen)
            except SpecError as error:  # a model near divergence must not stop the others
                print(f"{label}: {error}", file=sys.stderr)
                continue
            model = prepared.model(self.spec.machine, checkpoint.spec, chosen)
            quantized = evaluate(model, self._evaluation(checkpoint.spec), f"{label} {name}", total)
            size = count_stored_bytes(prepared.params, resolve(chosen, checkpoint.spec), prepared.ranges)
            result["recipes"][name] = to_json_values(quantized) | {
                "bytes": size,
                "ranges": ranges_json(prepared.ranges),
            }

    def _evaluation(self, model: ModelSpec, limit: int | None = None) -> Iterable[Batch]:
        return self.data.split_batches("evaluation", model, BATCH, 0, limit=limit)

    def _history(self, name: str) -> History:
        path = self.out / self.runs[name]["checkpoint"]
        try:
            return History.of(load_checkpoint(path).extra)
        except KeyError as error:
            raise FileError(f"{path} is no run of this study: tensor {error} is missing") from None

    def _read(self) -> dict[str, Any]:
        """The study in the folder. Raises FileError where it is not to be gone on with, or another one."""
        if not self.resume:
            raise FileError(f"{self.path} exists: go on with --resume, or choose another --out")
        known = read_study(self.path)
        try:
            was = from_dict(StudySpec, known["spec"])
            if known["runs"] and "calibration_seed" not in known:
                print(f"{self.path}: the runs it has were calibrated with their own seeds", file=sys.stderr)
        except SpecError as error:
            raise FileError(f"{self.path} is not a study that qtx wrote ({error}); choose another --out") from None
        if was != self.spec:
            raise FileError(
                f"{self.path} is another study: {describe_difference('study', to_dict(was), to_dict(self.spec))}"
            )
        return known


def run_study(spec: StudySpec, out: Path, *, resume: bool = False) -> Study:
    """Trains and evaluates every run of a study, and leaves it in the folder `out`; returns it, `tabulate` and `result`
    say what came out.

    resume: go on with the study that is there, if there is one.

    Raises:
        SpecError, DataError: a name or number that does not exist, or data that do not fit.
        FileError: `out` holds another study, or one without `resume`, or is held by another process.
        MissingExtra, WriteError, Interrupted: see `train`.
    """
    with hold(out):
        study = Study(spec, out, resume=resume)
        study.run()
        return study


def degradation(kind: str, before: float | None, after: float | None) -> float | None:
    """Perplexity: its relative increase in percent. Accuracy: percentage points lost. None where one is missing."""
    if before is None or after is None:
        return None
    return before - after if kind == "accuracy" else 100 * (after / before - 1)
