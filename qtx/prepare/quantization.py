"""Float and quantized evaluation of a model, calibration, and the rule that their data never overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from qtx_ref.integer.lifting import real
from qtx_ref.ops import cross_entropy
from qtx_ref.spec import (
    FloatFormat,
    FloatQuantSpec,
    InputTransform,
    ModelSpec,
    Output,
    Quant,
    QuantSpec,
    Range,
    Recipe,
    SpecError,
)
from qtx_ref.tape import const

from ..progress import Progress
from ..recipes.named import resolve
from ..recipes.sites import paper_sites
from .transforms import rewrite, transform

SHORT = 16  # hexadecimal digits by which sections are told apart
BATCH = 16  # sequences or images of an evaluation or calibration batch
CALIBRATION_SEED = 0  # of calibration batches (BERT's masks are drawn from it), in every command and for every run


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood in nats over all targets, perplexity (its exponential) and accuracy in percent."""

    loss: float
    perplexity: float
    accuracy: float
    targets: int


@dataclass(frozen=True)
class Outliers:
    """The published metrics: the largest over sites of the mean inf norm, where, and the kurtosis averaged over sites."""

    max_inf_norm: float
    max_inf_norm_site: str
    average_kurtosis: float
    max_kurtosis: float
    max_kurtosis_site: str


def metric(spec: ModelSpec) -> str:
    """The field of `Score` that a family is judged by."""
    return "accuracy" if spec.classes else "perplexity"


def refuse_overlap(meta: Mapping[str, Any], data: Any, split: str) -> None:
    """Raises SpecError where a section of `split` is among those that the model, or a model that it began with, was trained
    on, or that it was calibrated on."""
    hashes = meta.get("data", {}).get("hashes", {})
    known = {"train": hashes.get("train", []), "calibration": meta.get("calibration", hashes.get("calibration", []))}
    known["earlier train"] = meta.get("trained_on", [])
    for use in known:
        seen = {known_hash[:SHORT] for known_hash in known[use]}
        if use != split and (shared := seen & {found[:SHORT] for found in data.hashes(split)}):
            raise SpecError(
                f"{len(shared)} section(s) of the {split} data are this model's {use} data (first hash "
                f"{sorted(shared)[0][:12]}): give other data"
            )


def evaluate(model: Any, batches: Iterable[Mapping[str, Any]], label: str = "evaluate", total: int = 0) -> Score:
    """The score of a model, float or bound, over batches. Raises SpecError without a target."""
    total_loss, count, right = 0.0, 0, 0
    with Progress(label, total) as bar:
        for batch in batches:
            part = model.evaluate(batch)
            total_loss, count, right = total_loss + part[0], count + part[1], right + part[2]
            bar.advance()
    if count == 0:
        raise SpecError("evaluation found no target: the data are empty")
    mean = total_loss / count
    return Score(mean, math.exp(mean) if mean < 700 else math.inf, 100 * right / count, count)


class Answers(NamedTuple):
    """Of each sequence (or image) of a batch, (B,) each: summed negative log-likelihood in nats, targets, and how many of
    them were predicted right."""

    loss: np.ndarray
    count: np.ndarray
    right: np.ndarray


def answers(model: Any, batch: Mapping[str, Any]) -> Answers:
    """What a model of either kind answers, scored by the reference's float64 code, whichever backend ran it."""
    integer = not hasattr(model, "forward")
    output = model.run(batch) if integer else model.forward(batch)
    targets = batch["targets"] if "targets" in batch else batch["labels"]
    found = np.zeros((3, len(targets)))
    for i in range(len(targets)):  # float64 logits of one sequence at a time
        row = slice(i, i + 1)
        real_targets = targets[row] >= 0
        if real_targets.any():
            one = Output(*(part[row] if part.ndim and len(part) > 1 else part for part in output)) if integer else None
            logits = real(one) if integer else output[row]
            right = ((logits.argmax(axis=-1) == targets[row]) & real_targets).sum()
            some = real_targets.sum()
            found[:, i] = float(cross_entropy(const(logits), targets[row]).value) * some, some, right
    return Answers(found[0], found[1].astype(np.int64), found[2].astype(np.int64))


class IntegerScorer:
    """What `evaluate` asks of an integer model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def evaluate(self, batch: Mapping[str, Any]) -> tuple[float, int, int]:
        """Summed negative log-likelihood in nats, number of targets, number predicted right."""
        loss, count, right = answers(self.model, batch)
        return math.fsum(loss), int(count.sum()), int(right.sum())


def outliers(model: Any, batches: Iterable[Mapping[str, Any]]) -> Outliers:
    """The published metrics of a float model: per site the mean over units of all batches, then over sites."""
    chosen = paper_sites(model.spec)
    sums: dict[str, dict[str, tuple[float, int]]] = {"inf_norm": {}, "kurtosis_published": {}}
    for batch in batches:
        for site, found in model.statistics(batch, chosen.inf_norm, tuple(sums)).items():
            for name, values in found.items():
                total, count = sums[name].get(site, (0.0, 0))
                sums[name][site] = (total + float(values.sum()), count + values.size)
    mean = {name: {site: total / count for site, (total, count) in found.items()} for name, found in sums.items()}
    norms = mean["inf_norm"]
    kurtoses = mean["kurtosis_published"]
    largest, peak = max(norms, key=norms.__getitem__), max(chosen.kurtosis, key=kurtoses.__getitem__)
    average = sum(kurtoses[site] for site in chosen.kurtosis) / len(chosen.kurtosis)
    return Outliers(norms[largest], largest, average, kurtoses[peak], peak)


def calibration(data: Any, spec: ModelSpec) -> Callable[[int], Iterable[Mapping[str, Any]]]:
    """What `prepare` takes: the first n batches of the calibration split, anew each time, the same for every command."""
    return lambda count: data.split_batches("calibration", spec, BATCH, CALIBRATION_SEED, limit=count)


def calibrate(model: Any, data: Any, recipe: Recipe) -> dict[str, Range]:
    """Static ranges of a recipe, from its number of batches of the calibration split."""
    return find_ranges(model, calibration(data, model.spec)(recipe.batches), recipe, {})


def find_ranges(
    model: Any, batches: Iterable[Mapping[str, Any]], recipe: Recipe, transforms: Mapping[str, InputTransform]
) -> dict[str, Range]:
    quants = resolve(recipe, model.spec)
    quantize, masked = recipe.quantize_while_calibrating, recipe.masked_scores
    try:
        return model.calibrate(batches, quants, quantize=quantize, masked_scores=masked, transforms=transforms)
    except ValueError as error:
        raise SpecError(f"recipe {recipe.name} cannot be calibrated: {error}") from None


def bind(
    model: Any, recipe: Recipe, ranges: Mapping[str, Range], transforms: Mapping[str, InputTransform] | None = None
) -> None:
    """Puts a model under a recipe's fake quantization."""
    quants = resolve(recipe, model.spec)
    model.bind(quants, ranges, masked_scores=recipe.masked_scores, transforms=transforms)


@dataclass
class Prepared:
    """A quantized model: parameters, rewritten where the recipe says so, static ranges, the transforms of linears' inputs
    that no norm has taken in, and the parameters as they were before they were rewritten, where they were."""

    params: dict[str, np.ndarray]
    ranges: dict[str, Range]
    transforms: dict[str, InputTransform]
    before: Mapping[str, np.ndarray] | None = None

    def model(self, machine: Any, spec: ModelSpec, recipe: Recipe) -> Any:
        """The model under the recipe's fake quantization."""
        model = machine.model(spec, self.params)
        bind(model, recipe, self.ranges, self.transforms)
        return model


def prepare(
    machine: Any,
    spec: ModelSpec,
    params: Mapping[str, np.ndarray],
    batches: Callable[[int], Iterable[Mapping[str, Any]]],
    recipe: Recipe,
    *,
    ranges: Mapping[str, Range] | None = None,
) -> Prepared:
    """From a float model to what a recipe makes of it: transforms, then ranges, then rewritten weights.

    batches: the first n calibration batches, anew each time. ranges: already calibrated, on the transformed model.
    Raises SpecError for what cannot be transformed, calibrated or rewritten, naming the site.
    """
    quants = resolve(recipe, spec)
    transforms: dict[str, InputTransform] = {}
    if recipe.transforms:
        params, transforms = transform(machine, spec, params, batches, recipe)
    if ranges is not None and recipe.rewrite is None:
        return Prepared(params, dict(ranges), transforms)
    model = machine.model(spec, params)
    if ranges is None:
        ranges = find_ranges(model, batches(recipe.batches), recipe, transforms)
    if recipe.rewrite is None:
        return Prepared(params, dict(ranges), transforms)
    model.bind({}, {}, transforms=transforms)
    return Prepared(rewrite(model, params, batches, recipe, quants, ranges), dict(ranges), transforms, params)


def stored_bytes(params: Mapping[str, np.ndarray], quants: Mapping[str, Quant], ranges: Mapping[str, Range]) -> int:
    """Bytes of the parameters under a recipe: codes as an artifact stores them (up to 4 bits two to a byte, up to 8 one,
    else two), what stays in float as it is, and float32 scale and int32 zero point of every static range.

    Small floats likewise, their MX blocks with a byte of scale each.
    """
    total = sum(range_.scale.nbytes + range_.zero_point.nbytes for range_ in ranges.values())
    for name, value in params.items():
        quant = quants.get(name)
        if quant is None:
            total += value.nbytes
        elif width(quant) <= 4:
            total += value.size // value.shape[-1] * -(-value.shape[-1] // 2)
        else:
            total += value.size * (1 if width(quant) <= 8 else 2)
        if isinstance(quant, FloatQuantSpec) and quant.block:
            total += value.size // quant.block
    return total


def width(quant: Quant) -> int:
    """Bits of a code."""
    if isinstance(quant, QuantSpec):
        return quant.bits
    return 4 if quant.format is FloatFormat.E2M1 else 8


def ranges_json(ranges: Mapping[str, Range]) -> dict[str, dict[str, list[float] | list[int]]]:
    """Static ranges as JSON values, by site: low, high, scale and zero point, each as a flat list."""
    return {
        site: {key: np.asarray(value).ravel().tolist() for key, value in range_._asdict().items()}
        for site, range_ in ranges.items()
    }


def as_json(record: Any) -> dict[str, Any]:
    """A score or an outlier record as JSON values; numbers that are not finite become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(record).items()
    }
