"""Whole models in integers: every code and accumulator of every site, torch against the reference."""

from __future__ import annotations

from functools import partial

import numpy as np

from parity_tests.proof.case import Case, Context
from parity_tests.proof.verdict import Verdict, exact
from parity_tests.subjects import integer_models
from parity_tests.subjects.integer_models import Lowered, record_run, same
from qtx_ref import backend as ref_backend
from qtx_ref.integer.lifting import real
from qtx_ref.profiles import NAMES
from qtx_ref.spec import Nonlinear
from qtx_torch.backend import IntegerModel

PROFILES = ("float32", "gemmlowp", "tflite", "onnx")  # of all small models; the engines' others of one
ANY = "bert_gate_mlp"
GROUPED = ("w8a8-peg4p", "w8a8-out3", "w8a16-peg2", "w4a8-channel-peg8", "wide rows", "channels along sums")
RECIPES = ("w4a8", "w6a6", "w8a16", "channels", "rows", "operands", "values", *GROUPED)
SMALL = ("bert_gate_mlp", "opt_post_norm_projected", "vit_clipped_row")
STRICT = ("bert_sink_and_mlp", "bert_gate_head_conditional", "bert_classify", "opt_gate_linear", "vit_clipped_row")


def compare_backends(low: Lowered, context: Context) -> list[Verdict]:
    """torch's run held to the reference's."""
    want = record_run(low.model(ref_backend.IntegerModel), low.batch)
    return same(record_run(low.model(IntegerModel, device=context.device), low.batch), want)


def lower_preset(name: str, kind: str, context: Context) -> Lowered:
    spec, params, batches = integer_models.preset_after_training(name, kind, context)
    return integer_models.lower_model(spec, params, batches[:2], integer_models.inputs(batches))


def check_preset(name: str, kind: str, context: Context) -> list[Verdict]:
    """A small preset after 50 training steps, w8a8, six full-length inputs, two of them with padding."""
    return compare_backends(lower_preset(name, kind, context), context)


def check_small(name: str, recipe: str, profile: str, nonlinear: Nonlinear, context: Context) -> list[Verdict]:
    return compare_backends(integer_models.small(name, recipe, profile, nonlinear), context)


def check_strict(nonlinear: Nonlinear, recipe: str, context: Context) -> list[Verdict]:
    """Without a float: the same codes, in both backends. Strict runs on the cpu alone."""
    verdicts = []
    for name in STRICT:
        low = integer_models.small(name, recipe, "qtx", nonlinear)
        want = record_run(low.model(ref_backend.IntegerModel), low.batch)
        for model in (ref_backend.IntegerModel, IntegerModel):
            verdicts += same(record_run(low.model(model, strict=True), low.batch), want)
        if low.spec.causal:
            start, make = low.batch["tokens"][:, :2], low.model(ref_backend.IntegerModel).generate
            text = make(start, 4, lambda scores: scores.argmax(-1))
            got = low.model(IntegerModel, strict=True).generate(start, 4, lambda scores: scores.argmax(-1))
            verdicts.append(exact(f"{name}: text", got, text))
    return verdicts


def check_generate(kind: str, context: Context) -> list[Verdict]:
    """Ten tokens with keys and values cached as codes: the reference's text and logits, and those without a cache."""
    low = lower_preset("opt-tiny", kind, context)
    start, count = low.batch["tokens"][:2, :5], 10
    seen: dict[str, list[np.ndarray]] = {"ref": [], "torch": []}
    texts = {}
    for who, model in (
        ("ref", low.model(ref_backend.IntegerModel)),
        ("torch", low.model(IntegerModel, device=context.device)),
    ):

        def greedy(scores: np.ndarray, kept: list[np.ndarray] = seen[who]) -> np.ndarray:
            kept.append(scores)
            return scores.argmax(-1)

        texts[who] = model.generate(start, count, greedy)
        whole = real(model.run({"tokens": texts[who], "mask": np.ones(texts[who].shape, bool)}))
        verdict = exact(f"{who}: with and without cache", np.stack(seen[who], 1), whole[:, start.shape[1] - 1 : -1])
        seen[f"{who} verdict"] = [verdict]
    return [
        exact("text", texts["torch"], texts["ref"]),
        exact("logits", np.stack(seen["torch"]), np.stack(seen["ref"])),
        *seen["ref verdict"],
        *seen["torch verdict"],
    ]


def list_cases() -> list[Case]:
    table, polynomial = Nonlinear
    rows = [
        Case("integer", f"{name}_{kind}", "torch", partial(check_preset, name, kind))
        for name in integer_models.PRESETS
        for kind in integer_models.attentions(name)
    ]
    chosen = [("w8a8", profile, table) for profile in PROFILES]
    chosen += [(recipe, "qtx", table) for recipe in RECIPES]
    chosen += [("w8a8-peg4p", profile, table) for profile in PROFILES] + [("w8a8-out3", "onnx", polynomial)]
    chosen += [("w8a8", "qtx", polynomial), ("rows", "qtx", polynomial), ("rows", "float32", polynomial)]
    rows += [
        Case("integer", "_".join((name, recipe, profile, str(kind))), "torch", partial(check_small, name, *choice))
        for name in SMALL
        for choice in chosen
        for recipe, profile, kind in [choice]
    ]
    rows += [
        Case("integer", f"{ANY}_w8a8_{profile}", "torch", partial(check_small, ANY, "w8a8", profile, table))
        for profile in NAMES[1:]
        if profile not in PROFILES
    ]
    rows += [
        Case("integer", f"generate_{kind}", "torch", partial(check_generate, kind)) for kind in ("vanilla", "sink")
    ]
    strict = [("w8a8", table), ("w8a8", polynomial), ("w8a8-peg4p", polynomial), ("w8a8-out3", table)]
    return rows + [
        Case("integer", "_".join(("strict", *map(str, choice))), "torch", partial(check_strict, kind, recipe))
        for recipe, kind in strict
        for choice in [(kind,) if recipe == "w8a8" else (recipe, kind)]
    ]
