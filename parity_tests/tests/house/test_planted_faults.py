"""Planted faults: each makes the case that it is planted for fail, and a checkpoint names the site."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import qtx_ref.ops
import qtx_ref.optim
import qtx_ref.quant.observers
import qtx_torch.attention
import qtx_torch.models
import qtx_torch.numerics
import qtx_torch.ops
import qtx_torch.optim
import qtx_torch.quant.affine
import qtx_torch.quant.gradients
import qtx_torch.random
import qtx_torch.stats
from parity_tests.proof.case import Context
from parity_tests.runner import check_checkpoint, run_case
from parity_tests.subjects import small_models, trained
from parity_tests.table import list_cases
from qtx_ref.tape import node
from qtx_torch import backend

Plant = Callable[[pytest.MonkeyPatch], None]


def model_with(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Plant:
    """torch's models get changed parameters, the reference's do not."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        def built(spec: object, params: dict, **where: str) -> backend.Model:
            return sound(spec, {**params, **change(params)}, **where)

        sound = backend.Model
        patch.setattr(backend, "Model", built)

    return plant


def changing(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    return model_with(lambda params: {key: change(params[key])})


def replaced(owner: object, name: str, make: Callable) -> Plant:
    """`owner.name` becomes make(what it was)."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def tanh_gelu(patch: pytest.MonkeyPatch) -> None:
    def gelu(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")

    patch.setattr(qtx_torch.ops, "gelu", gelu)
    patch.setitem(qtx_torch.numerics.ACTIVATIONS, "gelu", gelu)


def decay_biases_in_a_few_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trained, "SHARED", 5)
    patch.setattr(trained, "STEPS", 3)
    patch.setattr(qtx_torch.optim, "decays", lambda *given: True)


def turn_gradients_after_a_few_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trained, "SHARED", 15)
    patch.setattr(trained, "STEPS", 2)
    owner = qtx_torch.quant.gradients.Backward
    sound = owner.quantize
    turn = {"wgrad_gradient": -1}
    patch.setattr(owner, "quantize", lambda self, name, *given: turn.get(name, 1) * sound(self, name, *given))


def unclamped_zero_point(sound: Callable) -> Callable:
    def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: object, *rest) -> torch.Tensor:
        wide = replace(spec, bits=16)  # its clamp lets more zero points through
        s, z = scale.abs(), zero_point.round().clamp(wide.code_min - 9, wide.code_max)
        y, _ = qtx_torch.quant.affine.simulate(x, s, z, spec)
        good = sound(x, scale, zero_point, spec, *rest)
        return good + (y - good).detach()

    return quantize


def reciprocal(sound: Callable) -> Callable:
    return lambda x, scale, zero_point, *rest: (x.float() * (1 / scale)).round_().add_(zero_point)


def zero_point_first(sound: Callable) -> Callable:
    return lambda x, scale, zero_point, *rest: (x.float() / scale).add_(zero_point).round_()


def half_away(sound: Callable) -> Callable:
    def round_away(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, *rest: object) -> torch.Tensor:
        return ((x.float() / scale).abs() + 0.5).floor_().copysign_(x.float()).add_(zero_point)

    return round_away


def pass_everything(sound: Callable) -> Callable:
    return lambda x, *given: x + (sound(x, *given) - x).detach()


def scaled_loss(sound: Callable) -> Callable:
    return lambda logits, targets, *count: sound(logits, targets, *count) * (targets >= 0).sum() / targets.numel()


def wrong_slope(x: object) -> object:
    y = 1 / (1 + np.exp(-x.value))
    return node(y, (x, lambda g: g * y))


def ref_tanh_gelu(x: object) -> object:
    inner = math.sqrt(2 / math.pi) * (x.value + 0.044715 * x.value**3)
    return node(0.5 * x.value * (1 + np.tanh(inner)), (x, lambda g: g))


GATE, QUERY = "layer.0.attn.gate_logit.weight", "layer.0.attn.query.weight"
FAULTS: dict[str, tuple[str, str, Plant]] = {
    "decay on biases": ("torch", "optim/adamw", replaced(qtx_torch.optim, "decays", lambda d: lambda *a: True)),
    "decay on biases, in training": ("torch", "steps/vit-tiny_vanilla", decay_biases_in_a_few_steps),
    "tanh GELU": ("torch", "ops/gelu", tanh_gelu),
    "tanh GELU in a model": ("torch", "models/bert_plain", tanh_gelu),
    "tanh GELU in a quantized model": ("torch", "fakequant/bert_gate_mlp_w8a8_forced", tanh_gelu),
    "a zero point beyond the codes": (
        "torch",
        "quant/learned",
        replaced(qtx_torch.numerics, "learned_quantize", unclamped_zero_point),
    ),
    "codes that are not clamped": (
        "torch",
        "quant/ties",
        replaced(
            qtx_torch.quant.affine,
            "quantize",
            lambda q: lambda x, s, z, spec: qtx_torch.quant.rounding.round_level(x, s, z).int(),
        ),
    ),
    "codes off by one": (
        "torch",
        "quant/normal_tensor",
        replaced(qtx_torch.quant.affine, "quantize", lambda q: lambda x, s, z, spec: q(x, s, z, spec) + 1),
    ),
    "times the reciprocal": ("torch", "quant/ties", replaced(qtx_torch.quant.affine, "round_level", reciprocal)),
    "zero point before rounding": (
        "torch",
        "quant/ties",
        replaced(qtx_torch.quant.affine, "round_level", zero_point_first),
    ),
    "ties away from zero": ("torch", "quant/ties", replaced(qtx_torch.quant.affine, "round_level", half_away)),
    "a gradient through clamped codes": (
        "torch",
        "fakequant/opt_plain_w4a8_forced",
        replaced(qtx_torch.numerics, "fake_quantize", pass_everything),
    ),
    "a gradient through saturated floats": (
        "torch",
        "fakequant/opt_plain_blocks-e4m3_forced",
        replaced(qtx_torch.numerics, "fake_quantize", pass_everything),
    ),
    "a group of other channels": (
        "torch",
        "quant/observer_running",
        replaced(qtx_torch.quant.affine, "unite_groups", lambda u: lambda low, high, spec: (low, high)),
    ),
    "blocks shifted by one": (
        "torch",
        "fakequant/bert_gate_mlp_blocks-e2m1_forced",
        replaced(qtx_torch.quant.formats, "mx_scale", lambda s: lambda x, *given: s(x.roll(1, -1), *given)),
    ),
    "padding in a range": (
        "torch",
        "fakequant/opt_plain_w8a8_forced",
        replaced(qtx_torch.numerics.Float, "_where", lambda w: lambda self, y: None),
    ),
    "padding in a mean": (
        "torch",
        "models/bert_gate_head_conditional_float64",
        replaced(qtx_torch.numerics.Float, "_where", lambda w: lambda self, y: None),
    ),
    "one transposed gate": ("torch", "models/opt_gate_elementwise", changing(GATE, np.transpose)),
    "gates of two heads exchanged": ("torch", "models/vit_gate_linear", changing(GATE, lambda w: w[::-1].copy())),
    "a transposed weight": ("torch", "models/bert_plain_float64", changing(QUERY, np.transpose)),
    "a NaN in a weight": ("torch", "models/opt_clipped", changing(QUERY, lambda w: np.where(w == w.max(), np.nan, w))),
    "scores that are not scaled": (
        "torch",
        "attention/clipped_causal",
        replaced(qtx_torch.ops, "scores", lambda s: lambda q, k, factor: s(q, k, 1.0)),
    ),
    "a mask that sees one token ahead": (
        "torch",
        "attention/softmax1_causal",
        replaced(qtx_torch.attention, "attention_mask", lambda m: lambda r, q, k, c, *on: m(r, q, k, False, *on)),
    ),
    "a loss over all tokens": ("torch", "models/bert_sink", replaced(qtx_torch.models, "cross_entropy", scaled_loss)),
    "another Philox": ("torch", "random/philox", replaced(qtx_torch.random, "WEYL", lambda w: (w[1], w[0]))),
    "a part that draws as if it were the first": (
        "torch",
        "accumulation/bert_plain_dropout_0.1_gradients",
        replaced(qtx_torch.random, "keep_mask", lambda keep: lambda *given: keep(*given[:5], 0)),
    ),
    "another dropout": (
        "torch",
        "models/vit_plain_dropout",
        replaced(qtx_torch.random, "keep_mask", lambda keep: lambda seed, step, *rest: keep(seed, step + 1, *rest)),
    ),
    "a gradient's range from one element": (
        "torch",
        "gradients/8-tensor_codes",
        replaced(qtx_torch.quant.gradients, "find_scale", lambda f: lambda x, quant: f(x[..., :1], quant)),
    ),
    "a gradient's scale from its neighbours": (
        "torch",
        "gradients/mxfp8_codes",
        replaced(qtx_torch.quant.gradients, "find_scale", lambda f: lambda x, quant: f(x.roll(1, 0), quant)),
    ),
    "gradients rounded to nearest": (
        "torch",
        "gradients/fp8_codes",
        replaced(
            qtx_torch.quant.gradients,
            "quantize_operand",
            lambda q: lambda x, axis, quant, words=None, where=None: q(x, axis, quant, None, where),
        ),
    ),
    "padding in a gradient product": (
        "torch",
        "gradients/8_codes",
        replaced(
            qtx_torch.quant.gradients,
            "quantize_operand",
            lambda q: lambda x, axis, quant, words=None, where=None: q(x, axis, quant, words),
        ),
    ),
    "a gradient with the words of another step": (
        "torch",
        "gradients/bert_gate_mlp_w8a8+grad8_forced",
        replaced(qtx_torch.random, "bits", lambda b: lambda seed, step, *n: b(seed, step + 1, *n)),
    ),
    "a gradient product whose factor is lost": (
        "torch",
        "gradients/vit_clipped_row_w8a8+gradmxfp4_forced",
        replaced(qtx_torch.ops, "scale", lambda s: lambda x, factor: s(x, factor) + x - x.detach()),
    ),
    "gradients of weights turned round, running freely": (
        "torch",
        "gradients/vit-tiny_w8a8+grad8_free",
        turn_gradients_after_a_few_steps,
    ),
    "a range that sees spared tokens": (
        "torch",
        "fakequant/opt_plain_w8a8_spared",
        replaced(qtx_torch.numerics, "leave_out", lambda f: lambda where, spared: where),
    ),
    "a spared token that is quantized": (
        "ref",
        "fakequant/spared",
        replaced(qtx_ref.ops, "select", lambda f: lambda where, a, b: b),
    ),
    "a biased deviation": (
        "torch",
        "stats/statistics",
        replaced(qtx_torch.stats, "kurtosis_published", lambda k: qtx_torch.stats.kurtosis),
    ),
    "the reference's tanh GELU": ("ref", "ops/gelu_value", replaced(qtx_ref.ops, "gelu", lambda g: ref_tanh_gelu)),
    "the reference's wrong slope": (
        "ref",
        "ops/sigmoid_gradient",
        replaced(qtx_ref.ops, "sigmoid", lambda s: wrong_slope),
    ),
    "the reference's decay on biases": (
        "ref",
        "optim/adamw",
        replaced(qtx_ref.optim, "decays", lambda d: lambda *a: True),
    ),
    "the reference's one-sided percentile": (
        "ref",
        "quant/percentiles",
        replaced(qtx_ref.quant.observers, "percentile", lambda p: lambda values, q: p(values, max(q, 50.0))),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend_name, case_id, plant = FAULTS[fault]
    case = next(case for case in list_cases(backend_name) if case.id == case_id)
    plant(monkeypatch)
    row = run_case(case, Context())
    assert not row.ok and not row.failure and row.worst is not None and not row.worst.ok, row


def test_checkpoint_names_the_first_site(monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_models.build("bert_gate_mlp")
    tanh_gelu(monkeypatch)
    assert check_checkpoint(small.spec, small.params, [small.batch]).first == "layer.0.ffn.activation"
    broken = {**small.params, "layer.1.attn.value.bias": small.params["layer.1.attn.value.bias"] * np.nan}
    monkeypatch.undo()
    assert check_checkpoint(small.spec, broken, [small.batch]).first == "layer.1.attn.value"
