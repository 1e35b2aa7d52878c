"""Whole models under fake quantization: teacher-forced to the bit, free-running with the share of codes that flip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import nn

from parity_tests.proof import teacher
from parity_tests.proof.case import Case, Context
from parity_tests.proof.evaluate_torch import array
from parity_tests.proof.verdict import Verdict, exact, relative, relative_rms, report
from parity_tests.subjects import small_models
from parity_tests.subjects.trained import ATTENTIONS, PRESETS, train_preset
from qtx.jobs.training import Machine
from qtx.prepare.transforms import transform
from qtx.recipes import named as recipes
from qtx.recipes.sites import extents
from qtx_ref.backend import Model as RefModel
from qtx_ref.numerics import is_weight
from qtx_ref.quant import quantizer
from qtx_ref.spec import (
    FloatFormat,
    FloatQuantSpec,
    Granularity,
    Head,
    InputTransform,
    ModelSpec,
    Quant,
    QuantSpec,
    Range,
    Recipe,
    Rule,
    SharedScale,
    Transform,
    TransformKind,
)
from qtx_torch import numerics
from qtx_torch.backend import Model
from qtx_torch.sites import swap_hooks

SMALL = ("bert_gate_mlp", "opt_plain", "opt_gate_linear", "opt_post_norm_projected", "vit_clipped_row", "bert_classify")
BLOCKS = tuple(f"blocks-{form}" for form in FloatFormat)  # as MX, in models too narrow for blocks of 32
TRANSFORMS = ("smooth", "hadamard")
SPARED = ("w8a8", "w8a8-token", "train-w8a8-tensor", "lsq-w4a6", "paper", "outliers")
RECIPES = (
    *("w8a8", "w4a8", "train-w8a8", "lsq-w4a6", "paper", "fp8-e4m3", "fp8-e5m2"),
    *("groups", "blocks", *BLOCKS, "outliers", *TRANSFORMS),
)
Batch = dict[str, np.ndarray]
Subject = tuple[ModelSpec, dict[str, np.ndarray], list[Batch]]


def build_subject(name: str, kind: str, context: Context) -> Subject:
    """A small preset after 50 steps (two sequences or images a batch), or a small model (with padding)."""
    if name in PRESETS:
        t = train_preset(name, kind, context)
        return t.spec, t.params, [{key: value[:2] for key, value in batch.items()} for batch in t.batches[:3]]
    small = small_models.build(name)
    return (
        small.spec,
        small.params,
        [small.batch, small_models.make_batch(small.spec, 2), small_models.make_batch(small.spec, 4)],
    )


def resolve_recipe(name: str, spec: ModelSpec) -> tuple[Recipe, dict[str, Quant]]:
    """`paper`: the family's. `groups`, `blocks...`: those at every site that can be divided by 2."""
    if name.startswith(("groups", "blocks")):
        recipe = halve_sites(name, spec)
    elif name in ("outliers", *TRANSFORMS):
        recipe = quantize_operands(name)
    else:
        recipe = recipes.recipe(f"paper-{spec.family}" if name == "paper" else name, spec)
    return recipe, recipes.resolve(recipe, spec)


def halve_sites(name: str, spec: ModelSpec) -> Recipe:
    """Two groups, permuted and static, of operands dynamic; or dynamic blocks of 2, of codes or of small floats."""
    sizes = {site: extent[name != "groups"] for site, extent in extents(spec).items()}
    chosen = tuple(site for site, size in sizes.items() if size % 2 == 0)
    operands = tuple(site for site in chosen if site.endswith((".input", ".weight")))
    if name == "groups":
        first: Quant = QuantSpec(8, granularity=Granularity.GROUP, groups=2, permute=True, observer=recipes.RUNNING)
        second: Quant = QuantSpec(4, True, granularity=Granularity.GROUP, groups=2, dynamic=True)
    elif name == "blocks":
        first = second = QuantSpec(4, granularity=Granularity.BLOCK, block=2, dynamic=True)
    else:
        form, rules = FloatFormat(name.removeprefix("blocks-")), list(SharedScale)
        first, second = (
            FloatQuantSpec(form, granularity=Granularity.BLOCK, block=2, dynamic=True, shared=rule)
            for rule in rules[:2]
        )
    return Recipe(name, (Rule(chosen, first, "every site"), Rule(operands, second, "operands")), batches=2)


def quantize_operands(name: str) -> Recipe:
    """Every linear's weight and operand, with outlier channels in float, or the operand transformed."""
    rows = QuantSpec(8, True, granularity=Granularity.TOKEN, dynamic=True, outliers=2.0)
    tensors = QuantSpec(8, observer=recipes.RUNNING)
    rules = (
        Rule(("layer.*.weight",), QuantSpec(8, True, granularity=Granularity.CHANNEL), "every linear"),
        Rule(("*norm.weight",), None, "not an operand"),
        Rule(("layer.*.input",), rows if name == "outliers" else tensors, "operands"),
    )
    made = {
        "outliers": (),
        "smooth": (Transform(("layer.*",), TransformKind.SMOOTH, "every linear", strength=0.5),),
        "hadamard": (Transform(("layer.*",), TransformKind.HADAMARD, "every linear"),),
    }
    return Recipe(name, rules, batches=2, transforms=made[name])


def check_forced(
    name: str, kind: str, recipe_name: str, context: Context, *, spare: tuple[int, ...] = ()
) -> list[Verdict]:
    """Calibration on two batches, then a forward pass of a third, each op and quantizer fed the reference's tensors.
    spare: places of tokens that stay in float."""
    spec, params, batches = build_subject(name, kind, context)
    if spare:
        batches = [spare_places(batch, spec, spare) for batch in batches]
    recipe, quants = resolve_recipe(recipe_name, spec)
    params, transforms = transform(Machine("ref"), spec, params, lambda n: batches[:n], recipe)
    ref, model = RefModel(spec, params), Model(spec, params, device=context.device)
    model.bind({}, {}, transforms=transforms)
    options = {"quantize": recipe.quantize_while_calibrating, "masked_scores": recipe.masked_scores}
    verdicts, ranges = calibrate_both(ref, model, batches[:2], quants, transforms, options, context)
    held = {"masked_scores": recipe.masked_scores, "transforms": transforms}
    crossings = teacher.record(teacher.FakeQuant(quants, ranges, **held), ref, batches[2])
    model.bind(quants, ranges, **held)
    return verdicts + teacher.force(model, batches[2], crossings, find_quantizers(model), context)


def spare_places(batch: Batch, spec: ModelSpec, places: tuple[int, ...]) -> Batch:
    """The batch with the tokens of these places spared, in all sequences but the last."""
    spared = np.zeros((len(next(iter(batch.values()))), spec.length), bool)
    spared[:-1, places] = True
    return {**batch, "spared": spared}


def calibrate_both(
    ref: RefModel,
    model: Model,
    batches: Sequence[Batch],
    quants: Mapping[str, Quant],
    transforms: Mapping[str, InputTransform],
    options: Mapping[str, bool],
    context: Context,
) -> tuple[list[Verdict], dict[str, Range]]:
    """Both backends' observers fed the reference's tensors: what they pass on and the ranges they choose, to the
    bit."""
    nx = teacher.Calibrate(quants, transforms=transforms, **options)
    hooks: dict[str, nn.Module] = {key: numerics.Calibrate(key, quant, **options) for key, quant in quants.items()}
    verdicts = []
    for batch in batches:
        with torch.no_grad():
            verdicts += teacher.force(model, batch, teacher.record(nx, ref, batch), hooks, context)
    ranges = nx.ranges()
    for key, want in ranges.items():
        for part, a, b in zip(Range._fields, hooks[key].range(), want, strict=True):
            verdicts.append(exact(f"{key}: {part}", array(a), b))
    return verdicts, ranges


def find_quantizers(model: Model) -> dict[str, nn.Module]:
    """The quantizers of a bound model, by key; none where it is in float."""
    return {hook.site: hook for hook in model.net.modules() if isinstance(hook, numerics.FakeQuant)}


class RecordOutput(nn.Module):
    """A quantizer that keeps what it passes on."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: torch.Tensor, where: torch.Tensor | None, spared: torch.Tensor | None = None) -> torch.Tensor:
        self.value = self.quantizer(x, where, spared)
        return self.value


def check_free(name: str, kind: str, recipe_name: str, context: Context) -> list[Verdict]:
    """The same ranges, each backend on its own: noise of float32 flips codes near ties, and the flips add up."""
    spec, params, batches = build_subject(name, kind, context)
    recipe, quants = resolve_recipe(recipe_name, spec)
    ref, model = RefModel(spec, params), Model(spec, params, device=context.device)
    options = {"masked_scores": recipe.masked_scores}
    ranges = ref.calibrate(batches[:2], quants, quantize=recipe.quantize_while_calibrating, **options)
    for each in (ref, model):
        each.bind(quants, ranges, **options)
    return measure_flips(ref, model, batches[2], recipe.masked_scores)


def measure_flips(ref: RefModel, model: Model, batch: Batch, masked_scores: bool) -> list[Verdict]:
    """Of two bound models that run freely: the share of each site's codes that differ, and the loss. A dynamic scale
    follows the tensor's noise: there a code differs where the value does by half a step or more."""
    held = {"masked_scores": masked_scores, "transforms": ref.transforms}
    crossings = teacher.record(teacher.FakeQuant(ref.quants, ref.fixed, **held), ref, batch)
    keepers = {key: RecordOutput(hook) for key, hook in find_quantizers(model).items()}
    with swap_hooks(model.net, keepers):
        model.forward(batch)
    verdicts = []
    for key in (key for key in crossings if key in keepers):
        got, want, quant = array(keepers[key].value), crossings[key].after, ref.quants[key]
        differ = got != want
        if quant.dynamic and isinstance(quant, QuantSpec):
            scale, _ = quantizer.dynamic_scale(crossings[key].before, quant, crossings[key].where, is_weight(key))
            differ = (np.abs(got - want) >= scale / 2) & (scale > 0)  # 0: channels that stay in float
        rate = float(differ.mean())
        verdicts.append(report(key, "flip rate", rate, "float noise near ties; reported, not bounded"))
    if model.spec.head is not Head.NONE:
        losses = [each.evaluate(batch)[0] for each in (model, ref)]
        verdicts.append(report("loss", "relative", abs(losses[0] / losses[1] - 1), "follows from the flips"))
    return verdicts


def check_calibration(name: str, context: Context) -> list[Verdict]:
    """Float calibration, each backend on its own: the extremes of float32 tensors differ by their noise alone."""
    spec, params, batches = build_subject(name, "", context)
    verdicts = []
    for recipe_name in ("w8a8", "w4a8"):
        _, quants = resolve_recipe(recipe_name, spec)
        want = RefModel(spec, params).calibrate(batches, quants)
        got = Model(spec, params, device=context.device).calibrate(batches, quants)
        for key, range in want.items():
            reason = "float32 noise of an element, through two layers"
            verdicts.append(relative(f"{key}: low and high", np.stack(got[key][:2]), np.stack(range[:2]), 1e-5, reason))
    return verdicts


def check_learned(context: Context) -> list[Verdict]:
    """Gradients of learned scales and zero points, through whole models and from the same operands."""
    verdicts = []
    for name in ("bert_gate_mlp", "opt_plain", "vit_clipped_row"):
        spec, params, batches = build_subject(name, "", context)
        recipe, quants = resolve_recipe("lsq-w8a8", spec)
        ref, model = RefModel(spec, params), Model(spec, params, device=context.device)
        ranges = ref.calibrate(batches[:2], quants)
        for each in (ref, model):
            each.bind(quants, ranges)
        want_loss, want = ref.gradients(batches[2])
        got_loss, got = model.gradients(batches[2])
        verdicts.append(relative(f"{name}: loss", got_loss, want_loss, 1e-3, "a flipped code changes it"))
        for key, g in want.items():
            if key.endswith((".scale", ".zero_point")) and np.abs(g).max() > 0:
                verdicts.append(
                    relative_rms(f"{name}: gradient of {key}", got[key], g, 5e-2, "flipped codes near ties")
                )
    return verdicts


def list_cases() -> list[Case]:
    def rows(what: str, run: object, names: tuple, kinds: tuple, recipe_names: tuple) -> list[Case]:
        return [
            Case(
                "fakequant",
                "_".join(filter(None, (name, kind, recipe, what))),
                "torch",
                partial(run, name, kind, recipe),
            )
            for name, kind, recipe in product(names, kinds, recipe_names)
        ]

    return [
        *rows("forced", check_forced, SMALL, ("",), RECIPES),
        *rows("spared", partial(check_forced, spare=(0, 3)), SMALL, ("",), SPARED),
        *rows("forced", check_forced, PRESETS, tuple(ATTENTIONS), ("w8a8", "paper")),
        *rows("forced", check_forced, PRESETS, ("gated",), ("fp8-e4m3", "mxfp8", "mxfp4")),
        *rows("free", check_free, PRESETS, tuple(ATTENTIONS), ("w8a8", "paper")),
        *[Case("fakequant", f"{name}_calibration", "torch", partial(check_calibration, name)) for name in SMALL],
        Case("fakequant", "learned_gradients", "torch", check_learned),
    ]
