"""torch's random bits, optimizer, statistics, learned ranges and generated text against the reference's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import torch

from parity_tests.mirror.steps import FUSED
from parity_tests.proof.case import Case, Context
from parity_tests.proof.evaluate_ref import cotangent
from parity_tests.proof.evaluate_torch import array, tensor
from parity_tests.proof.verdict import Verdict, exact, relative, relative_rms, within
from parity_tests.subjects import small_models
from qtx_ref import numerics as ref_numerics
from qtx_ref import ops as ref_ops
from qtx_ref import optim as ref_optim
from qtx_ref import random as ref_random
from qtx_ref import stats as ref_stats
from qtx_ref.backend import Model as RefModel
from qtx_ref.spec import OptimSpec, QuantSpec, Schedule
from qtx_ref.tape import backward, const, leaf
from qtx_torch import numerics, optim, random, stats
from qtx_torch.backend import Model

REORDERED = 1e-12, "float64 sums in another order"


def check_philox(context: Context) -> list[Verdict]:
    """Counters over the whole range of 32-bit words, and the extremes."""
    rng = ref_random.stream(0, "philox")
    counter = rng.integers(0, 2**32, (4, 500), dtype=np.uint64)
    counter[:, :3] = np.array([[0, 2**32 - 1, 2**31]] * 4, np.uint64)
    verdicts = []
    for key in ((0, 0), (2**32 - 1, 2**32 - 1), (0xA4093822, 0x299F31D0)):
        words = random.philox(tensor(counter.astype(np.int64), context), key)
        verdicts.append(exact(f"key {key}", array(words).astype(np.uint64), ref_random.philox(counter, key)))
    return verdicts


def check_dropout(context: Context) -> list[Verdict]:
    """Words by (seed, step, site, count, first) and the mask that dropout makes of them. Counters pass 2^32 at word
    2^34."""
    verdicts = []
    for seed, step, site, count, first in (
        (0, 0, "a", 1, 0),
        (2**63 + 11, 7, "layer.3.attn.probs", 1003, 0),
        (5, 2**31, "embed.sum", 64, 2),
        (5, 2**31, "embed.sum", 1, 7),
        (1, 2**32 - 1, "b", 70_001, 2**34 - 35_001),
    ):
        with torch.device(context.device):
            words = random.bits(seed, step, site, count, first)
            keep = random.keep_mask(seed, step, site, (count, 3), 0.1, first)
            places = torch.tensor(step), site, count, torch.tensor(first)
            held = random.bits(seed, *places)
        name = f"seed {seed}, step {step}, {site} from {first}"
        want = ref_random.keep_mask(seed, step, site, (count, 3), 0.1, first)
        verdicts.append(exact(name, array(words).astype(np.uint64), ref_random.bits(seed, step, site, count, first)))
        verdicts.append(exact(f"{name}: kept", array(keep), want))
        verdicts.append(exact(f"{name}: step and first as tensors", array(held), array(words)))
    return verdicts


def check_dropped_model(name: str, context: Context) -> list[Verdict]:
    """Loss and gradients in float64 with dropout everywhere: both drop the same elements."""
    small = small_models.build(name)
    spec = replace(small.spec, dropout=0.3, attention_dropout=0.2)
    models = [m(spec, small.params, dtype="float64") for m in (partial(Model, device=context.device), RefModel)]
    (got_loss, got), (want_loss, want) = (m.gradients(small.batch, training=True, seed=3, step=5) for m in models)
    reason = "the same sums in another order in float64"
    verdicts = [relative("loss", got_loss, want_loss, 1e-12, reason)]
    largest = max(float(np.abs(g).max()) for g in want.values())
    reason = "float64 noise beside the largest gradient of the model"
    return verdicts + [within(f"gradient of {key}", got[key], g, 1e-12 * largest, reason) for key, g in want.items()]


def check_schedule(context: Context) -> list[Verdict]:
    verdicts = []
    for schedule, zero in product(Schedule, (False, True)):
        spec = OptimSpec(lr=3e-4, warmup=7, steps=23, schedule=schedule, first_rate_zero=zero)
        rates = [[m.learning_rate(spec, step) for step in range(25)] for m in (optim, ref_optim)]
        verdicts.append(exact(f"{schedule}, first rate zero {zero}", *rates))
    return verdicts


def check_clipping(context: Context) -> list[Verdict]:
    """The norm, and gradients above, at and below the limit."""
    rng = ref_random.stream(0, "clip")
    grads = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (("a", (40, 30)), ("b", (7,)))}
    _, norm = ref_optim.clip_by_norm(grads, 0)
    verdicts = []
    for limit in (0.0, 1.0, norm, 2 * norm):
        got, got_norm = optim.clip_by_norm({k: tensor(g, context) for k, g in grads.items()}, limit)
        want, want_norm = ref_optim.clip_by_norm(grads, limit)
        verdicts.append(relative(f"norm, limit {limit:.4g}", got_norm, want_norm, *REORDERED))
        reason = "the factor may round to either of two neighbours"
        verdicts += [relative(f"{k}, limit {limit:.4g}", array(got[k]), g, 2e-7, reason) for k, g in want.items()]
    return verdicts


def check_adamw(context: Context) -> list[Verdict]:
    """30 steps from the same gradients, with and without clipping and decay of norm gains and of the per-head gate;
    biases and sinks never decay."""
    names = {
        "ffn.output.weight": (20, 30),
        "ffn.output.bias": (20,),
        "ffn.norm.weight": (30,),
        "attn.probs.sink": (4,),
        "attn.gate_logit.bias": (4,),
    }
    verdicts = []
    for gains, clip in ((False, 0.0), (True, 0.5)):
        own = {"decay_norm_gains": gains, "decay_head_gates": gains, "clip_norm": clip}
        spec = OptimSpec(lr=0.01, weight_decay=0.3, warmup=3, steps=40, **own)
        rng = ref_random.stream(0, "adamw", gains)
        first = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
        params = {name: tensor(value, context).requires_grad_() for name, value in first.items()}
        theirs, ours = ref_optim.AdamW(first, spec), optim.AdamW(params, spec)
        for _ in range(30):
            grads = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
            ours.step({name: tensor(g, context) for name, g in grads.items()})
            theirs.step(grads)
        bound = (1e-6, "each of 30 updates rounds") if context.device == "cpu" else FUSED
        for name, value in first.items():
            verdicts.append(relative_rms(f"{name}, gains decay {gains}", array(params[name]), value, *bound))
            for moment in ("m", "v"):
                pair = array(getattr(ours, moment)[name]), getattr(theirs, moment)[name]
                verdicts.append(relative_rms(f"{moment} of {name}, gains decay {gains}", *pair, *bound))
    return verdicts


def check_statistics(context: Context) -> list[Verdict]:
    """Every statistic of long-tailed tensors, masked and not, by sequence and by token, and of constant ones."""
    rng = ref_random.stream(0, "statistics")
    tails = rng.standard_t(2, size=(3, 11, 8)).astype(np.float32)
    masks = {
        "all": None,
        "masked": rng.uniform(size=(3, 11, 1)) < 0.6,
        "a sequence masked": np.array([[[True]], [[False]], [[True]]]),
    }
    verdicts = []
    for kind, x in (("tails", tails), ("constant", np.full((3, 11, 8), 2.5, np.float32))):
        for (what, where), unit in product(masks.items(), ("sequence", "token")):
            kept = None if where is None else np.broadcast_to(where, (3, 11, 1))
            got = stats.describe(tensor(x, context), None if kept is None else tensor(kept, context), unit)
            for name, value in ref_stats.describe(x, kept, unit).items():
                verdicts.append(relative(f"{name}, {kind}, {what}, {unit}", array(got[name]), value, *REORDERED))
    for what, where in masks.items():
        kept = None if where is None else np.broadcast_to(where, (3, 11, 1))
        got = stats.moments(tensor(tails, context), None if kept is None else tensor(kept, context))
        for name, value in ref_stats.moments(tails, kept).items():
            verdicts.append(relative(f"{name}, {what}", array(got[name]), value, *REORDERED))
    energy = np.square(tails.astype(np.float64)).sum(axis=(0, 1))
    share = stats.top_share(torch.from_numpy(energy).to(context.device), 0.3)
    verdicts.append(relative("top share", share, ref_stats.top_share(energy, 0.3), *REORDERED))
    return verdicts


def check_attention(context: Context) -> list[Verdict]:
    """Mass, entropy, update, sizes and openings of each head, under causal and padded masks, with rows without keys."""
    rng = ref_random.stream(0, "attention statistics")
    probs, keys = rng.uniform(size=(3, 2, 11, 11)).astype(np.float32), rng.uniform(size=(3, 11)) < 0.3
    probs[0, 1, 4] = 0  # as clipping may leave it
    allowed = np.tril(np.ones((1, 1, 11, 11), bool)) & (rng.uniform(size=(3, 1, 1, 11)) < 0.6)
    context_, weight, residual = (rng.normal(size=size).astype(np.float32) for size in ((3, 11, 8), (8, 8), (3, 11, 8)))
    residual[1, 2] = 0
    verdicts = []
    for name, where in (("causal and padded", allowed), ("open", np.ones((1, 1, 11, 11), bool))):
        got = stats.attention(tensor(probs, context), tensor(where, context), {"some": tensor(keys, context)})
        for key, value in ref_stats.attention(probs, where, {"some": keys}).items():
            verdicts.append(relative(f"{key}, {name}", array(got[key]), value, *REORDERED))
    for name, kept in (("all", None), ("masked", rng.uniform(size=(3, 11, 1)) < 0.6)):
        ours = [tensor(x, context) for x in (context_, weight, residual)]
        got = stats.updates(*ours, None if kept is None else tensor(kept, context), 2)
        for key, value in ref_stats.updates(context_, weight, residual, kept, 2).items():
            verdicts.append(relative(f"{key}, {name}", array(got[key]), value, *REORDERED))
        ours = (tensor(context_, context), None if kept is None else tensor(kept, context))
        got = stats.sizes(*ours, {"some": tensor(keys, context)}, 2)
        for key, value in ref_stats.sizes(context_, kept, {"some": keys}, 2).items():
            verdicts.append(relative(f"size {key}, {name}", array(got[key]), value, *REORDERED))
        for size in ((2,), (3, 1, 2), (3, 11, 2), (3, 11, 8)):
            gate, where = rng.uniform(size=size).astype(np.float32), kept if size[1:2] == (11,) else None
            got = stats.openings(tensor(gate, context), None if where is None else tensor(where, context), 2)
            for key, value in ref_stats.openings(gate, where, 2).items():
                verdicts.append(relative(f"{key} {size}, {name}", array(got[key]), value, *REORDERED))
    return verdicts


def check_learned(context: Context) -> list[Verdict]:
    """Learned ranges from the same operands: value and gradient of x to the bit, of scale and zero point nearly."""
    rng = ref_random.stream(0, "learned")
    x = rng.standard_t(3, size=(2, 9, 6)).astype(np.float32)
    verdicts = []
    for bits, symmetric, shape in product((2, 4, 8), (False, True), ((1, 1, 1), (1, 1, 6))):
        spec = QuantSpec(bits, symmetric, learned=True)
        scale = (rng.uniform(0.5, 1.5, shape) * 4 / spec.code_max).astype(np.float32)
        scale.flat[-1] *= -1 if shape != (1, 1, 1) else 1  # training may carry it below 0; its size counts
        zero = (np.zeros(shape) if symmetric else rng.uniform(-2, spec.code_max + 2, shape)).astype(np.float32)
        held = [leaf(x), leaf(scale), leaf(zero)]
        y = ref_numerics.learned_quantize(*held, spec)
        g = cotangent(y.shape).astype(np.float32)
        want = backward(ref_ops.total(ref_ops.mul(y, const(g))), held)
        ours = [tensor(value, context).requires_grad_() for value in (x, scale, zero)]
        z = numerics.learned_quantize(*ours, spec)
        got = torch.autograd.grad(z, ours, tensor(g, context), allow_unused=True)
        name = f"{bits} bits, symmetric {symmetric}, {shape[-1]} ranges"
        verdicts += [
            exact(f"{name}: value", array(z), y.value),
            exact(f"{name}: gradient of x", array(got[0]), want[0]),
        ]
        reason = "float32 terms, summed in float64; they cancel"
        verdicts.append(relative(f"{name}: gradient of scale", array(got[1]), want[1], 1e-5, reason))
        if not symmetric:
            verdicts.append(relative(f"{name}: gradient of zero point", array(got[2]), want[2], 1e-6, reason))
    return verdicts


def check_generate(context: Context) -> list[Verdict]:
    """Greedy text: with the cache as without it, and the same as the reference's; a full pass gives the same logits."""
    verdicts = []
    for name, spec in small_models.specs().items():
        if spec.head != "causal":
            continue
        params = small_models.build(name).params
        model, ref = (
            Model(spec, params, device=context.device, dtype="float64"),
            RefModel(spec, params, dtype="float64"),
        )
        start = np.arange(6).reshape(2, 3) % spec.vocab
        seen: list[np.ndarray] = []

        def greedy(logits: np.ndarray, seen: list[np.ndarray] = seen) -> np.ndarray:
            seen.append(logits)
            return logits.argmax(-1)

        text = model.generate(start, spec.length - 3, greedy)
        verdicts.append(exact(f"{name}: text", text, ref.generate(start, spec.length - 3, lambda z: z.argmax(-1))))
        whole = model.forward({"tokens": text, "mask": np.ones(text.shape, bool)})[:, 2:-1]
        verdicts.append(relative(f"{name}: logits", np.stack(seen, 1), whole, 1e-12, "float64 sums in another order"))
    return verdicts


def list_cases() -> list[Case]:
    runs = {
        "random": (check_philox, check_dropout),
        "optim": (check_schedule, check_clipping, check_adamw),
        "stats": (check_statistics, check_attention),
        "quant": (check_learned,),
        "generate": (check_generate,),
    }
    rows = [
        Case(group, run.__name__.removeprefix("check_"), "torch", run) for group, cases in runs.items() for run in cases
    ]
    names = ("bert_classify", "bert_gate_mlp", "opt_clipped", "vit_plain")
    return rows + [Case("models", f"{name}_dropout", "torch", partial(check_dropped_model, name)) for name in names]
