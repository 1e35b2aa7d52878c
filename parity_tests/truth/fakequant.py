"""The reference's whole models under fake quantization against the definition of a quantizer."""

from __future__ import annotations

import numpy as np

from parity_tests.proof.case import Case, Context
from parity_tests.proof.verdict import Verdict, equal, exact, holds, relative
from parity_tests.subjects import small_models
from qtx_ref import models
from qtx_ref.backend import Model
from qtx_ref.numerics import FakeQuant
from qtx_ref.spec import QuantSpec
from qtx_ref.tape import Var

MODELS = ("bert_gate_mlp", "opt_post_norm_projected", "vit_clipped")


class RecordPairs(FakeQuant):
    """Keeps what enters and leaves each quantizer."""

    def apply(self, site: str, x: Var, where: np.ndarray | None) -> Var:
        y = super().apply(site, x, where)
        self.pairs = {**getattr(self, "pairs", {}), site: (x.value, y.value)}
        return y


def quantize_every_site(model: Model, batch: dict[str, np.ndarray], bits: int) -> dict[str, QuantSpec]:
    """Every named tensor asymmetric, every matrix and table symmetric, one range each."""
    weights = [name for name in model.weights if name.endswith(".weight") and "norm" not in name and "cls" not in name]
    return {site: QuantSpec(bits, symmetric=site in weights) for site in [*model.record(batch), *weights]}


def check_nearest(context: Context) -> list[Verdict]:
    """Each 4-bit site passes on the value of a code, and of all codes one of the nearest."""
    verdicts = []
    for name in MODELS:
        small = small_models.build(name)
        model = Model(small.spec, small.params)
        quants = quantize_every_site(model, small.batch, 4)
        ranges = model.calibrate([small.batch], quants)
        nx = RecordPairs(quants, ranges)
        nx.load(model.weights)
        models.forward(nx, small.spec, small.batch)
        verdicts.append(equal(f"{name}: sites seen", sorted(nx.pairs), sorted(quants)))
        for site, (x, y) in nx.pairs.items():
            codes = np.arange(-8, 8) if quants[site].symmetric else np.arange(16)
            grid = (ranges[site].scale * (codes - ranges[site].zero_point).astype(np.float32)).ravel()
            verdicts.append(exact(f"{name}: {site} is on the grid", np.isin(y, grid), np.ones(y.shape, bool)))
            beyond = np.abs(x - y) - np.abs(x[..., None] - grid).min(-1)
            reason = "distance beyond the nearest: at a tie, the rounding of x / scale and of both differences"
            verdicts.append(holds(f"{name}: {site}", float(beyond.max()), 1e-6 * float(np.abs(x).max()), reason))
    return verdicts


def check_sixteen_bits(context: Context) -> list[Verdict]:
    """Quantizers on every site at 16 bits hardly change the loss; without quantizers nothing changes."""
    verdicts = []
    for name in MODELS:
        small = small_models.build(name)
        model = Model(small.spec, small.params)
        plain, _, _ = model.evaluate(small.batch)
        quants = quantize_every_site(model, small.batch, 16)
        model.bind(quants, model.calibrate([small.batch], quants))
        reason = "steps of 2^-16 of each range through two layers"
        verdicts.append(relative(f"{name}: loss at 16 bits", model.evaluate(small.batch)[0], plain, 1e-3, reason))
        verdicts.append(equal(f"{name}: it is quantized", model.evaluate(small.batch)[0] != plain, True))
        model.bind({}, {})
        verdicts.append(exact(f"{name}: loss without quantizers", model.evaluate(small.batch)[0], plain))
    return verdicts


def check_spared(context: Context) -> list[Verdict]:
    """With all tokens spared the weights alone are quantized, with none nothing changes; what spared tokens hold enters
    no range, static or of the tensor, and they pass every quantizer as they are."""
    verdicts = []
    for name in SPARING:
        small = small_models.build(name)
        model = Model(small.spec, small.params)
        every, none = np.ones(small.batch["tokens"].shape, bool), np.zeros(small.batch["tokens"].shape, bool)
        first = np.arange(small.spec.length) == np.zeros((len(every), 1))
        quants = quantize_every_site(model, small.batch, 4)
        del quants["embed.position"]  # BERT's has no axis of sequences
        ranges = model.calibrate([small.batch], quants)
        model.bind(quants, ranges)
        plain = model.forward(small.batch)
        verdicts.append(exact(f"{name}: none", model.forward({**small.batch, "spared": none}), plain))
        whole = model.forward({**small.batch, "spared": every})
        model.bind({site: quant for site, quant in quants.items() if site.endswith(".weight")}, ranges)
        verdicts.append(exact(f"{name}: all", whole, model.forward(small.batch)))
        large = RecordPairs(quants, model.calibrate([{**small.batch, "spared": first}], quants))
        large.load(model.weights)
        models.forward(large, small.spec, {**small.batch, "spared": first})
        for site, (x, _) in large.pairs.items():
            if x.shape[:2] == first.shape:
                kept = x[small.batch["mask"] & ~first]
                held = [kept.min(initial=0), kept.max(initial=0)]
                got = model.calibrate([{**small.batch, "spared": first}], {site: quants[site]})[site]
                reason = "one float32 element of the same float pass"
                verdicts.append(equal(f"{name}: {site}", [float(got.low.min()), float(got.high.max())], held))
    return verdicts


def list_cases() -> list[Case]:
    runs = check_nearest, check_sixteen_bits, check_spared
    return [Case("fakequant", run.__name__.removeprefix("check_"), "ref", run) for run in runs]
