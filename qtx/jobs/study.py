"""The main job: train the same model with several attentions under equal conditions, quantize each, compare.

The table is that of Bondarenko et al. 2023: float perplexity (or accuracy), max inf norm, average kurtosis, quantized
perplexity, and the degradation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.spec import SpecError

from ..data import ChainData, TextData, unigram_perplexity
from ..data.spec import DataSpec
from ..data.splits import BATCH
from ..engines.protocols import Data
from ..files.container import STUDY, FileError, check_writable, write_sealed_json
from ..files.locks import LOCK, hold
from ..files.results import read_study
from ..files.writing import check_space
from ..measure.history import History
from ..measure.published import make_column
from ..measure.scores import metric
from ..measure.sinks import SINKS
from ..prepare.calibration import CALIBRATION_SEED
from ..recipes.named import recipe, training_recipe
from ..report.study import Layout, tabulate_study
from ..report.tables import format_number
from ..runs.reading import RunSpec
from .drawing import draw_study
from .measuring import Finished
from .rows import Row, describe_shape, keep_run, keep_value, list_integers, list_recipes, make_rows, read_kept
from .run import checkpoint_bytes, describe_difference
from .side_by_side import run_side_by_side, share_threads
from .training import fit_vocabulary, train


class Study:
    """A study in a folder: `study.json`, one checkpoint per run in `<run>-seed<N>/`, pictures."""

    def __init__(self, run: RunSpec, out: Path, *, resume: bool, jobs: int = 1, only: str | None = None) -> None:
        """Checks everything before any training.

        jobs: rows that are trained at once, each in a process of its own where they are several. only: this row alone,
        in such a process: its study's file is another's.

        Raises:
            SpecError, DataError: a name or number that does not exist.
            FileError: `out` holds a study, and `resume` is not set or it is another one.
        """
        self.spec, self.out, self.resume, self.jobs = run, out, resume, jobs
        self.recipes, self.rows = list_recipes(run), make_rows(run)
        if only is not None:
            self.rows = {only: self.rows[only]}
        for row in self.rows.values():
            for name in (*self.recipes, *row.integers):
                recipe(name, row.model)
            if row.quant:
                training_recipe(row.quant, row.model)
        self.path = out / "study.json"
        known = None
        if only is None:
            known = self._find_known()
            check_writable(self.path)
        for machine in {row.machine for row in self.rows.values()}:
            machine.check()
        self._check_space({} if known is None else known["runs"])
        self.data = self._load()
        self.models = {
            name: row.model if row.origin else fit_vocabulary(row.model, self.data[name])
            for name, row in self.rows.items()
        }
        self.first = next(iter(self.rows))
        self.runs: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        if only is None:
            self.conditions = self._describe_conditions()
            self.unigram = self._measure_unigram()
        if known is not None:
            for key, value in self.conditions.items():
                if known.get(key) != value:
                    words = describe_difference(key, known.get(key), value)
                    raise FileError(f"{self.path} is another study: {words}")
            self.runs = known["runs"]

    def _describe_conditions(self) -> dict[str, Any]:
        """What must be equal for a study to go on beside what its rows say, as JSON values."""
        described = [data.describe() for data in self._list_data()]
        conditions: dict[str, Any] = {
            "data": described[0] if len(described) == 1 else described,
            "threads": share_threads(self.rows[self.first].machine, self.jobs),
        }
        begun = {str(row.origin.path): row.origin.sha256 for row in self.rows.values() if row.origin}
        return conditions | ({"init": begun} if begun else {})

    def _load(self) -> dict[str, Data]:
        """The data of every run by its name, equal ones loaded once."""
        loaded: dict[tuple[DataSpec, str | None], Data] = {}
        data: dict[str, Data] = {}
        for name, row in self.rows.items():
            key = row.data, None if row.origin is None else row.origin.sha256
            if key not in loaded:
                loaded[key] = row.load()
            data[name] = loaded[key]
        return data

    def _list_data(self) -> list[Data]:
        """The data of the runs, each once."""
        return list({id(data): data for data in self.data.values()}.values())

    def _measure_unigram(self) -> float | None:
        """What a unigram model makes of the targets, where all runs have the same."""
        (data, *others), model = self._list_data(), self.models[self.first]
        limit, *other = {row.limit for row in self.rows.values()}
        if others or other or not isinstance(data, TextData):
            return None
        return unigram_perplexity(data, model, 0, BATCH, limit)

    def _name_best(self) -> list[str]:
        """The perplexity that no model can better, in words, where it is known and the same of all runs."""
        (data, *others), models = self._list_data(), self.models.values()
        least = {data.entropy(model) for model in models} if isinstance(data, ChainData) and not others else set()
        return [f"no model can better: perplexity {format_number(math.exp(nats))}" for nats in least if len(least) == 1]

    def _check_space(self, done: Mapping[str, Any]) -> None:
        """Raises WriteError where the disk has no room for the checkpoints of the runs that are not done."""
        left = [row for name, row in self.rows.items() if name not in done]
        check_space(self.path, sum(checkpoint_bytes(row.model, row.optim, row.machine.dtype) for row in left))

    def run(self) -> None:
        """Trains and evaluates every run that is not finished. `study.json` is written after each.

        Raises FileError where another process holds the folder, and what `train` raises.
        """
        with hold(self.out):
            left = [name for name in self.rows if name not in self.runs]
            if self.jobs == 1:
                for name in left:
                    self.keep(name, self.complete(name))
            elif left:
                task = {"spec": keep_run(self.spec), "out": str(self.out), "resume": self.resume}
                tasks = {name: {**task, "row": name} for name in left}
                self.failed = run_side_by_side(tasks, self.jobs, self.conditions["threads"], self.out, self.keep)
            self.save()
            drawn = draw_study(self.out, self.rows, self.runs, self._list_sinks())
            self.written = ["study.json", "a checkpoint per run", *drawn]

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Adds a run's result, in the order of the rows, and writes `study.json`. Raises WriteError where it cannot."""
        known = {**self.runs, name: result}
        self.runs = {one: known[one] for one in self.rows if one in known}
        self.save()

    def result(self) -> dict[str, Any]:
        """What `study.json` holds."""
        about = {"calibration_seed": CALIBRATION_SEED, "unigram_perplexity": self.unigram, "runs": self.runs}
        return {"spec": keep_run(self.spec), **self.conditions, **about}

    def save(self) -> None:
        """Writes `study.json`. Raises WriteError where that cannot be."""
        write_sealed_json(self.path, STUDY, self.result())

    def tabulate(self) -> str:
        """The table, see `report.study.tabulate_study`."""
        lines = {row.line: row for row in self.rows.values()}
        beside, notes = self._find_published(list(lines.values()))
        if self.unigram is not None:
            notes = [*notes, f"unigram model on the same targets: perplexity {format_number(self.unigram)}"]
        notes = [*notes, *self._name_best()]
        layout = Layout(
            metric(self.models[self.first]),
            self.recipes,
            list_integers(self.rows),
            trained=any(row.quant for row in self.rows.values()),
            sinks=self._list_sinks(),
            published=beside,
            notes=notes,
        )
        grouped: dict[str, list[dict[str, Any]]] = {line: [] for line in lines}
        for name, run in self.runs.items():
            grouped[self.rows[name].line].append(run)
        return tabulate_study(grouped, layout)

    def _list_sinks(self) -> list[str]:
        """The kinds of tokens whose mass is shown: the first, and where a model sees what follows, the others that
        there are."""
        known = {sink for run in self.runs.values() for sink in (run.get("sinks") or {}).get("mass", ())}
        causal = all(row.model.causal for row in self.rows.values())
        return [name for name in SINKS if name == "first" or (name in known and not causal)]

    def _find_published(self, rows: Sequence[Row]) -> tuple[list[str], list[str]]:
        """What is published of each row, or of its attention in another shape of its family; nothing of models that
        begin with a checkpoint, nor of a chain, whose text is no language."""
        if any(row.origin for row in rows) or any(isinstance(data, ChainData) for data in self._list_data()):
            return [], []
        models = [(row.model, row.recipe) for row in rows]
        cells, sources = make_column(describe_shape(self.rows), models, self.recipes)
        return cells if sources else [], sources

    def complete(self, name: str) -> dict[str, Any]:
        """Trains and evaluates a row, from where it stands; its result as JSON values. Raises what `train` raises."""
        row, path = self.rows[name], self.out / name / "model.safetensors"
        checkpoint = train(
            row.make_train(self.models[name]),
            self.data[name],
            path,
            row.machine,
            resume=self.resume or path.exists(),
            label=name,
            start=row.begin(),
        )
        history = History.of(checkpoint.extra)
        result: dict[str, Any] = {
            "attention": row.kind,
            "train_quant": row.quant,
            "seed": row.seed,
            "settings": {key: keep_value(value) for key, value in row.varied.items()},
            "checkpoint": str(path.relative_to(self.out)),
            "diverged": checkpoint.meta["diverged"],
            "float": None,
            "outliers": None,
            "sinks": None,
            "float_bytes": None,
            "trained": None,
            "recipes": {},
            "integers": {},
            "watch": history.watched(),
            "mean_loss": float(np.mean(history.loss)) if history.loss else None,  # in training, over all steps
        }
        if "diverged_at" not in checkpoint.meta:
            finished = Finished(checkpoint, self.data[name], row.machine, row.limit, f"{name} evaluate")
            result |= finished.measure(self.recipes, row.integers, trained=row.quant is not None)
        return result

    def _find_known(self) -> dict[str, Any] | None:
        """The study in the folder; None where there is none. Raises FileError where something else is in the folder."""
        if self.path.exists():
            return self._read()
        if self.out.is_dir() and any(item.name != LOCK for item in self.out.iterdir()) and not self.resume:
            raise FileError(f"{self.out} is not empty: go on with --resume, or choose another --out")
        return None

    def _read(self) -> dict[str, Any]:
        """The study in the folder. Raises FileError where it is not to be gone on with, or another one."""
        if not self.resume:
            raise FileError(f"{self.path} exists: go on with --resume, or choose another --out")
        known = read_study(self.path)
        try:
            kept = read_kept(known["spec"], str(self.path))
            recipes, rows = list_recipes(kept), make_rows(kept)
        except SpecError as error:
            raise FileError(f"{self.path} is not a study that qtx wrote ({error}); choose another --out") from None
        if known["runs"] and "calibration_seed" not in known:
            print(f"{self.path}: the runs it has were calibrated with their own seeds", file=sys.stderr)
        was, now = ({name: row.identify() for name, row in each.items()} for each in (rows, self.rows))
        if (was, recipes) != (now, self.recipes):
            words = describe_difference("study", {**was, "recipes": recipes}, {**now, "recipes": self.recipes})
            raise FileError(f"{self.path} is another study: {words}")
        ended = {name for name, row in rows.items() if row.run.get("stop") == self.rows[name].run.get("stop")}
        whole = {
            name: result
            for name, result in known["runs"].items()
            if name in ended and has_integers(result, self.rows[name].integers)
        }
        return known | {"runs": whole}


def has_integers(result: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether a run was measured in integers by all these recipes, or cannot be."""
    return result["float"] is None or result.get("integers", {}).keys() >= {*names}


def run_study(run: RunSpec, out: Path, *, resume: bool = False, jobs: int = 1) -> Study:
    """Trains and evaluates every run that a run's grids make, and leaves the study in the folder `out`; returns it,
    `tabulate` and `result` say what came out.

    resume: go on with the study that is there, if there is one; to another `stop` than it had, all its runs go on, and
    for integers that it has not, they are evaluated anew.
    jobs: rows that are trained at once, each in a process of its own where they are several; one that fails is then in
    the study's `failed`, and ends no other.

    Raises:
        SpecError, DataError: a name or number that does not exist, or data that do not fit.
        FileError: `out` holds another study, or one without `resume`, or is held by another process.
        MissingExtra, WriteError, Interrupted: see `train`.
    """
    with hold(out):
        study = Study(run, out, resume=resume, jobs=jobs)
        study.run()
        return study
