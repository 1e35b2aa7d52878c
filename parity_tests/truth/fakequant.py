"""The reference's whole models under fake quantization against the definition of a quantizer."""

from __future__ import annotations

import numpy as np

from parity_tests.proof.case import Case, Context
from parity_tests.proof.verdict import Verdict, equal, exact, holds, relative
from parity_tests.subjects import small_models
from qtx.recipes.named import LOOKUPS
from qtx.recipes.sites import sites
from qtx_ref import models
from qtx_ref.backend import Model
from qtx_ref.numerics import FakeQuant
from qtx_ref.spec import QuantSpec
from qtx_ref.tape import Var

MODELS = ("bert_gate_mlp", "opt_post_norm_projected", "vit_clipped")
SPARING = ("bert_gate_mlp", "opt_plain")


class RecordPairs(FakeQuant):
    """Keeps what enters and leaves each quantizer."""

    def apply(self, site: str, x: Var, where: np.ndarray | None) -> Var:
        y = super().apply(site, x, where)
        self.pairs = {**getattr(self, "pairs", {}), site: (x.value, y.value)}
        return y


class RecordBeside(FakeQuant):
    """Keeps each activation that enters a hook, and what the model goes on with, where one of its axes is of tokens."""

    def operand(self, site: str, x: Var, where: np.ndarray | None = None) -> Var:
        return self.keep(site, x, super().operand(site, x, where))

    def named(self, site: str, y: Var, where: np.ndarray | None = None) -> Var:
        return self.keep(site, y, super().named(site, y, where))

    def keep(self, site: str, before: Var, after: Var) -> Var:
        if before.ndim > 2:
            self.pairs = {**getattr(self, "pairs", {}), site: (before.value, after.value)}
        return after


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
    """With no token spared nothing changes; with all of them the weights alone are quantized; with the first its rows
    pass every quantizer as they are, and its elements enter no range."""
    verdicts = []
    for name in SPARING:
        small = small_models.build(name)
        model = Model(small.spec, small.params)
        shape = small.batch["tokens"].shape
        first = np.arange(shape[1]) == np.zeros((shape[0], 1))
        quants = quantize_every_site(model, small.batch, 4)
        quants = {site: quant for site, quant in quants.items() if site not in LOOKUPS}  # rows of quantized tables
        quants |= {site: QuantSpec(3) for site in sites(small.spec).operands}  # of what has 4 bits already
        ranges = model.calibrate([small.batch], quants)
        model.bind(quants, ranges)
        plain = model.forward(small.batch)
        verdicts.append(exact(f"{name}: none", model.forward({**small.batch, "spared": np.zeros(shape, bool)}), plain))
        whole = model.forward({**small.batch, "spared": np.ones(shape, bool)})
        model.bind({site: quant for site, quant in quants.items() if site.endswith(".weight")}, ranges)
        verdicts.append(exact(f"{name}: all", whole, model.forward(small.batch)))
        without = model.calibrate([{**small.batch, "spared": first}], quants)
        for site, (x, _) in model.record(small.batch).items():
            if site in quants and x.shape[:2] == shape:
                kept = x[small.batch["mask"] & ~first]
                ends = np.array([kept.min(), kept.max()])
                verdicts.append(exact(f"{name}: range of {site}", np.ravel(without[site][:2]), ends))
        nx = RecordBeside(quants, without)
        nx.load(model.weights)
        models.forward(nx, small.spec, {**small.batch, "spared": first})
        for site, (x, y) in nx.pairs.items():
            moved = (x != y).any(axis=(1, 3) if x.ndim == 4 else 2)  # (B, T), by query where there are heads
            verdicts.append(equal(f"{name}: {site} moves, first token", bool(moved[:, 0].any()), False))
            verdicts.append(equal(f"{name}: {site} moves, others", bool(moved[:, 1:].any()), site in quants))
    return verdicts


def list_cases() -> list[Case]:
    runs = check_nearest, check_sixteen_bits, check_spared
    return [Case("fakequant", run.__name__.removeprefix("check_"), "ref", run) for run in runs]
