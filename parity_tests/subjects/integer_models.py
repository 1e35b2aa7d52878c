"""Integer models for the cases: lowered once by the reference, run by either backend under a watch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from typing import Any

import numpy as np

from parity_tests.proof.case import Context
from parity_tests.proof.verdict import Verdict, equal, exact
from parity_tests.subjects import small_models
from qtx.data import load
from qtx.recipes import named as recipes
from qtx_ref import backend
from qtx_ref.integer.lowering import lower
from qtx_ref.models.initial import init_params
from qtx_ref.presets import GATES, SOFTMAXES, attention, preset
from qtx_ref.profiles import profile
from qtx_ref.spec import (
    Activation,
    Family,
    Gate,
    Granularity,
    ModelSpec,
    Nonlinear,
    OptimSpec,
    Output,
    Profile,
    QuantSpec,
    Range,
    Recipe,
    Rule,
)

PRESETS = ("bert-tiny", "opt-tiny", "vit-tiny")
STEPS = 50
OPTIM = OptimSpec(lr=1e-3, weight_decay=0.01, clip_norm=1.0, warmup=30, steps=300)
ROWS = QuantSpec(granularity=Granularity.TOKEN, dynamic=True)
CHANNELS = QuantSpec(symmetric=True, granularity=Granularity.CHANNEL)
WIDE = QuantSpec(granularity=Granularity.GROUP, wide=2)
VALUES = QuantSpec(granularity=Granularity.CHANNEL)
Batch = dict[str, np.ndarray]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Lowered:
    """An integer model as data, the float parameters and ranges it was made from, and inputs."""

    spec: ModelSpec
    params: Arrays
    ranges: Mapping[str, Range]
    constants: Arrays
    quants: Mapping[str, QuantSpec]
    profile: Profile
    batch: Batch

    def model(self, kind: Callable[..., Any], **options: Any) -> Any:
        """This model in the `IntegerModel` of a backend."""
        return kind(self.spec, self.constants, self.quants, self.profile, **options)


@dataclass(frozen=True)
class RunRecord:
    """All that a run showed, in order, and its output."""

    sites: list[tuple[str, np.ndarray]]
    output: Output


def attentions(name: str) -> list[str]:
    """Every softmax without a gate, and every gate under the plain softmax, that a preset can have."""
    gates = [str(gate) for gate in dict.fromkeys(GATES.values())]
    causal = preset(name).causal
    return [*SOFTMAXES, *(gate for gate in gates if not (causal and gate == Gate.HEAD_CONDITIONAL))]


def preset_after_training(name: str, kind: str, context: Context) -> tuple[ModelSpec, Arrays, list[Batch]]:
    """A small preset after 50 steps of torch, each on half a text or on 16 images; and the batches that follow."""

    def make() -> tuple[ModelSpec, Arrays, list[Batch]]:
        from qtx_torch.backend import Model, Trainer

        spec = replace(preset(name), attention=attention(kind))
        batches = load(None, spec).train_batches(spec, 16 if spec.family is Family.VIT else 1, seed=0)
        model = Model(spec, init_params(spec, 0))
        trainer = Trainer(model, OPTIM)
        for batch in islice(batches, STEPS):
            trainer.step({key: x[:, : spec.length // 2] if x.ndim == 2 else x for key, x in batch.items()})
        return spec, model.params(), list(islice(batches, 6))

    return context.once(("integer", name, kind), make)


def inputs(batches: list[Batch]) -> Batch:
    """Six full-length inputs in one batch; of texts, the last two with padding."""
    batch = {key: np.concatenate([b[key] for b in batches])[:6] for key in batches[0]}
    if "mask" in batch:
        batch["mask"] = batch["mask"].copy()
        batch["mask"][4, -17:] = False
        batch["mask"][5, 9:] = False
    return batch


def make_recipe(name: str, spec: ModelSpec, nonlinear: Nonlinear = Nonlinear.TABLE) -> Recipe:
    """A recipe of `qtx.recipes.named`, or w8a8 with one of the changes below."""
    base = recipes.recipe("w8a8", spec)
    gated = spec.attention.gate is not Gate.NONE
    rows = ["embed.norm", "layer.*norm", "*.attn.gated" if gated else "*.attn.context"]
    if spec.activation is Activation.RELU or nonlinear is Nonlinear.POLYNOMIAL:
        rows.append("*.ffn.activation")
    changes = {
        "rows": [Rule(tuple(rows), ROWS, "a scale per token of what enters a linear")],
        "operands": [Rule(("*.scores.lhs", "*.scores.rhs", "*.context.lhs"), ROWS, "a scale per token")],
        "wide rows": [  # codes of 16 bits beside scales per token, and where the result of a norm is wide
            Rule(tuple(rows), ROWS, "a scale per token of what enters a linear"),
            Rule(("embed.sum", "*.residual", "*.ffn.output", "*.attn.norm"), WIDE, "two channels in 16 bits"),
        ],
        "channels along sums": [Rule(("embed.sum", "*norm", "*.query", "*.residual"), VALUES, "a scale per channel")],
        "values": [Rule(("*.attn.value",), VALUES, "a scale per channel, which P V does not sum over")],
    }
    if name == "channels":
        weights = Rule(("*.weight",), CHANNELS, "a scale per output channel")
        return replace(recipes.post_training(8, 8), name=name, weights=weights).recipe()
    if name not in changes:
        return recipes.recipe(name, spec)
    return replace(base, name=name, rules=(*base.rules, *changes[name]))


def lower_model(
    spec: ModelSpec,
    params: Arrays,
    batches: list[Batch],
    batch: Batch,
    recipe: str = "w8a8",
    profile_name: str = "qtx",
    nonlinear: Nonlinear = Nonlinear.TABLE,
) -> Lowered:
    """Calibrated on `batches` and lowered, to be run on `batch`."""
    quants, chosen = recipes.resolve(make_recipe(recipe, spec, nonlinear), spec), profile(profile_name)
    ranges = backend.Model(spec, params).calibrate(batches, quants)
    constants = lower(spec, params, quants, ranges, chosen, nonlinear)
    return Lowered(spec, params, ranges, constants, quants, chosen, batch)


def small(name: str, *choice: Any) -> Lowered:
    """A small model of `small_models`, its batch with padding."""
    model = small_models.build(name, batch_size=4)
    return lower_model(model.spec, model.params, [model.batch], model.batch, *choice)


def record_run(model: Any, batch: Batch) -> RunRecord:
    sites: list[tuple[str, np.ndarray]] = []
    output = model.run(batch, lambda name, value: sites.append((name, value)))
    return RunRecord(sites, output)


def same(got: RunRecord, want: RunRecord) -> list[Verdict]:
    """Every code and accumulator of every site, their dtypes and their order, and the output."""
    kinds = ([f"{site} {x.dtype}" for site, x in seen.sites] for seen in (got, want))
    pairs = list(zip_longest(*kinds))
    first = next((pair for pair in pairs if pair[0] != pair[1]), (len(pairs), len(pairs)))
    verdicts = [equal("sites and dtypes", *first)]
    codes = dict(got.sites)
    verdicts += [exact(site, codes[site], value) for site, value in want.sites if site in codes]
    pairs = zip(Output._fields, got.output, want.output, strict=True)
    return verdicts + [exact(f"output {part}", a, b) for part, a, b in pairs]
