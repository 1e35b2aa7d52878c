"""The reference against values worked out by hand, published numbers and SciPy: sizes, optimizer, statistics."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from scipy import stats as scipy_stats

from parity_tests.proof.case import Case, Context
from parity_tests.proof.verdict import Verdict, exact, holds, relative, within
from parity_tests.subjects import small_models
from parity_tests.truth.quant import refuses
from qtx_ref import ops, optim, random, stats
from qtx_ref.attention import boolean_mask
from qtx_ref.backend import Model
from qtx_ref.models.initial import gate_shapes, shapes
from qtx_ref.presets import PRESETS
from qtx_ref.spec import AttentionSpec, Gate, ModelSpec, OptimSpec, Schedule
from qtx_ref.tape import const

F32 = np.float32
ROUNDING = 2e-7, "worked in exact arithmetic; float32 rounds at 6e-8"


def check_adamw(context: Context) -> list[Verdict]:
    """b1 = b2 = 1/2, lr 0.1, decay 0.5, gradients 1/2 then 1/4.

    Step 1: m' = 1/2, v' = 1/4, so w = 0.95 - 0.1. Step 2: m' = 1/3, v' = 1/8, so w = 0.95 w - 0.1 / 3 * sqrt(8).
    """
    spec = OptimSpec(lr=0.1, beta1=0.5, beta2=0.5, eps=0, weight_decay=0.5, clip_norm=0, schedule=Schedule.CONSTANT)
    second = 0.1 / 3 * math.sqrt(8)
    verdicts = []
    for gains, gain in ((False, 0.9 - second), (True, 0.95 * 0.85 - second)):
        params = {
            name: np.ones(2, F32)
            for name in (
                "ffn.output.weight",
                "ffn.output.bias",
                "ffn.norm.weight",
                "attn.probs.sink",
                "attn.gate_logit.bias",
            )
        }
        adam = optim.AdamW(params, replace(spec, decay_norm_gains=gains, decay_head_gates=gains))
        for g in (0.5, 0.25):
            adam.step({name: np.full(2, g, F32) for name in params})
        want = {"ffn.output.weight": 0.95 * 0.85 - second, "ffn.norm.weight": gain, "attn.gate_logit.bias": gain}
        for name, value in params.items():
            verdicts.append(
                relative(f"{name}, gains decay {gains}", value, [want.get(name, 0.9 - second)] * 2, *ROUNDING)
            )
    return verdicts


def check_clipping(context: Context) -> list[Verdict]:
    grads, norm = optim.clip_by_norm({"a": F32([3]), "b": F32([4])}, 1.0)
    same, _ = optim.clip_by_norm({"a": F32([3]), "b": F32([4])}, 5.001)
    return [
        exact("norm", norm, 5.0),
        relative(
            "clipped", [grads["a"][0], grads["b"][0]], [0.6, 0.8], 4e-7, "factor 1 / (5 + 1e-6), rounded to float32"
        ),
        exact("below the limit", [same["a"][0], same["b"][0]], [3.0, 4.0]),
    ]


def check_schedules(context: Context) -> list[Verdict]:
    def rates(schedule: Schedule, zero: bool = False) -> list[float]:
        spec = OptimSpec(lr=1.0, warmup=4, steps=10, schedule=schedule, first_rate_zero=zero)
        return [optim.learning_rate(spec, step) for step in range(11)]

    warm, root = [0.25, 0.5, 0.75, 1], math.sqrt(3) / 2
    tolerance = 1e-15, "cos and the division round in float64"
    return [
        exact("constant", rates(Schedule.CONSTANT), warm + [1.0] * 7),
        exact("constant, from 0", rates(Schedule.CONSTANT, True), [0, 0.25, 0.5, 0.75] + [1.0] * 7),
        within("linear", rates(Schedule.LINEAR), warm + [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0], *tolerance),
        within(
            "cosine",
            rates(Schedule.COSINE),
            warm + [1, (1 + root) / 2, 0.75, 0.5, 0.25, (1 - root) / 2, 0],
            *tolerance,
        ),
    ]


def check_probabilities(context: Context) -> list[Verdict]:
    """exp(ln 3) : exp(0) = 3 : 1; a masked row is 0; softmax1 adds 1 to the sum; clipped: from p = 3/4 and 1/4."""
    scores, mask = const(np.array([[math.log(3), 0.0], [5.0, 7.0]])), np.array([[True, True], [False, False]])
    p = ops.softmax(scores, mask)
    one = ops.softmax(scores, mask, const(np.zeros((1, 1))))
    clipped = ops.clip_stretch(p, -0.5, 1.5)  # 2 p - 1/2: 1 and 0
    tolerance = 1e-15, "exp and log round in float64"
    return [
        within("softmax", p.value, [[0.75, 0.25], [0, 0]], *tolerance),
        within("softmax1", one.value, [[0.6, 0.2], [0, 0]], *tolerance),
        within("clipped", clipped.value, [[1, 0], [0, 0]], *tolerance),
        within(
            "clipped, row's own gamma",
            ops.clip_stretch(p, np.array([[-0.2], [-1]]), 1.0).value,
            [[0.7, 0.1], [0, 0]],
            *tolerance,
        ),
    ]


def check_masks(context: Context) -> list[Verdict]:
    additive = boolean_mask(F32([[0, -10000, -np.inf, np.finfo(F32).min, -0.0]]))
    return [
        exact("additive", additive, np.array([[True, False, False, False, True]])),
        refuses("-5000", lambda: boolean_mask(F32([[0, -5000]]))),
        refuses("a mask of ones", lambda: boolean_mask(np.ones((1, 2)))),
    ]


def check_gate_sizes(context: Context) -> list[Verdict]:
    """Added parameters per layer: H, H(K+1), H(m(K+2)+1), H(D+1), D D."""
    verdicts = []
    for heads, width, hidden in ((1, 1, 1), (2, 8, 3), (12, 64, 16)):
        spec = ModelSpec(
            small_models.BERT.family,
            layers=1,
            width=heads * width,
            heads=heads,
            hidden=8,
            head="none",
            vocab=4,
            length=4,
        )  # type: ignore[arg-type]
        d = heads * width
        want = {
            Gate.NONE: 0,
            Gate.HEAD: heads,
            Gate.HEAD_CONDITIONAL: heads * (width + 1),
            Gate.LINEAR: heads * (width + 1),
            Gate.MLP: heads * (hidden * (width + 2) + 1),
            Gate.ALL_FEATURES: heads * (d + 1),
            Gate.ELEMENTWISE: d * d,
        }
        for gate, count in want.items():
            attention = AttentionSpec(gate=gate, gate_hidden=hidden if gate is Gate.MLP else None)
            sizes = [math.prod(shape) for shape in gate_shapes(replace(spec, attention=attention)).values()]
            verdicts.append(exact(f"{gate}, H = {heads}, K = {width}", sum(sizes), count))
    return verdicts


def check_published_sizes(context: Context) -> list[Verdict]:
    """Parameters of the published models, tied weights once; ViT-S/16 has no norm after its patches there."""
    known = {
        "bert-base": (PRESETS["bert-base"], 109_514_298),  # with the masked-language-model head
        "opt-125m": (PRESETS["opt-125m"], 125_239_296),
        "opt-350m": (PRESETS["opt-350m"], 331_196_416),
        "opt-1.3b": (PRESETS["opt-1.3b"], 1_315_758_080),
        "vit-s16": (replace(PRESETS["vit-s16"], patch_norm=False), 22_050_664),
    }
    return [
        exact(name, sum(math.prod(s) for s in shapes(spec).values()), count) for name, (spec, count) in known.items()
    ]


def check_philox(context: Context) -> list[Verdict]:
    """The known answers that Random123 publishes for Philox 4x32, 10 rounds."""
    table = [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]
    verdicts = []
    for counter, key, want in table:
        words = [[int(word, 16) for word in text.split()] for text in (counter, key, want)]
        got = random.philox(np.array(words[0], np.uint64)[:, None], (words[1][0], words[1][1]))
        verdicts.append(exact(f"counter {counter.strip()}", got[:, 0], np.array(words[2], np.uint64)))
    return verdicts


def check_dropped(context: Context) -> list[Verdict]:
    """Word e does not depend on what else is drawn; the share that dropout keeps is 1 - rate."""
    words = random.bits(2**40 + 7, 5, "layer.0.ffn.output", 4099)
    kept = random.keep_mask(1, 2, "a", (1000, 1000), 0.1).mean()
    return [
        exact("a prefix", random.bits(2**40 + 7, 5, "layer.0.ffn.output", 37), words[:37]),
        exact("a part", random.bits(2**40 + 7, 5, "layer.0.ffn.output", 1001, 38), words[38:1039]),
        within("share kept", kept, 0.9, 5 * math.sqrt(0.09 / 1e6), "five standard deviations of a million draws"),
    ]


def check_statistics(context: Context) -> list[Verdict]:
    """1, 2, 3, 4: m2 = 5/4, m4 = 41/16, unbiased s^2 = 5/3; and SciPy's moments on long tails."""
    x = F32([[[1, 2], [3, 4], [50, 60]]])
    where = np.array([[[True], [True], [False]]])
    tails = random.stream(0, "tails").standard_t(1.5, size=(4, 50, 6)).astype(F32)
    rows = tails.reshape(4, -1).astype(np.float64)
    far = np.abs(tails - rows.mean(1)[:, None, None]) > 6 * rows.std(1)[:, None, None]
    tolerance = 1e-12, "float64 sums in another order"
    s4 = np.var(rows, axis=1, ddof=1) ** 2
    small, long = stats.describe(-x, where), stats.describe(tails)
    n, mean, *sums = long["moments"].T
    moments = [scipy_stats.moment(rows, k, axis=1) * n for k in (2, 3, 4)]
    counts = np.zeros(stats.BINS, int)
    for value in np.abs(tails).ravel():  # 2^e (1 + k / 64) <= |x| < 2^e (1 + (k + 1) / 64) is bin 64 (e + 127) + k
        fraction, e = math.frexp(value)  # of 1/2 to 1, and the power of two above
        counts[64 * (e - 1 + 127) + math.floor(64 * (2 * fraction - 1))] += 1
    return [
        exact("inf norm", small["inf_norm"], [4.0]),
        exact("lowest", small["lowest"], [-4.0]),
        exact("highest", small["highest"], [-1.0]),
        exact("inf norm by token", stats.describe(x, where, "token")["inf_norm"], [2.0, 4.0]),
        relative("kurtosis", small["kurtosis"], [41 / 16 / (25 / 16)], *tolerance),
        relative("kurtosis, published", small["kurtosis_published"], [41 / 16 / (25 / 9 + 1e-6)], *tolerance),
        relative("kurtosis, SciPy", long["kurtosis"], scipy_stats.kurtosis(rows, axis=1, fisher=False), *tolerance),
        relative("kurtosis, published, SciPy", long["kurtosis_published"], moments[2] / n / (s4 + 1e-6), *tolerance),
        exact("count", n, [300.0] * 4),
        relative("mean", mean, rows.mean(1), *tolerance),
        *(relative(f"sum of powers, {k}", sums[k - 2], moments[k - 2], *tolerance) for k in (2, 3, 4)),
        exact("energy", small["energy"], [10.0, 20.0]),
        exact("top share", stats.top_share(np.array([1.0, 6.0, 1.0]), 0.01), 0.75),
        holds("no outlier to find", 1 - int(far.sum() > 2), 0, "the next two lines compare something"),
        exact("beyond 6 sigma by channel", long["beyond_channels"], far.sum((0, 1))),
        exact("beyond 6 sigma by token", long["beyond_tokens"], far.sum(2)),
        exact("histogram", long["histogram"], counts),
    ]


def check_attention(context: Context) -> list[Verdict]:
    """Two queries by hand: (1/2, 1/2) over two keys and (1/4, 1/4, 1/2) over three; parts of length 5 against 10."""
    probs = np.array([[[[0.5, 0.5, 0], [0.25, 0.25, 0.5], [0.1, 0.2, 0.7]]]])
    allowed = np.array([[[[True, True, False], [True, True, True], [False] * 3]]])
    sums = stats.attention(probs, allowed, {"ends": np.array([[True, False, True]])})
    entropies = np.log(2), 1.5 * np.log(2)
    tolerance = 1e-14, "logarithms rounded to float64"
    context_, weight = np.array([[[3.0, 4.0, 9.0, 9.0]]]), np.zeros((4, 4))
    weight[:2, :2] = np.eye(2)
    sizes = stats.updates(context_, weight, np.full((1, 1, 4), 5.0), None, 2)
    values = np.array(
        [[[3.0, 4, 0, 1], [6, 8, 0, 2], [99, 99, 99, 99]]]
    )  # lengths 5 and 10 of head 0, 1 and 2 of head 1
    real = np.array([[[True], [True], [False]]])
    parts = stats.sizes(values, real, {"ends": np.array([[False, True, True]])}, 2)
    gates = stats.openings(np.array([[[0.25, 0.75], [0.5, 1.0], [9.0, 9.0]]]), real, 2)
    return [
        exact("kept", sums["kept"], [2]),
        exact("sizes", [parts["all"], parts["count.all"]], [[15, 3], [2, 2]]),
        exact("sizes at marked tokens", [parts["ends"], parts["count.ends"]], [[10, 2], [1, 1]]),
        exact("openings", [gates["gate"], gates["gates"]], [[0.75, 1.75], [2, 2]]),
        exact(
            "openings of features", stats.openings(np.array([[[0.25, 0.75, 0.5, 1.0]]]), None, 2)["gate"], [0.5, 0.75]
        ),
        exact("openings of heads", stats.openings(np.array([0.25, 0.75]), None, 2)["gate"], [0.25, 0.75]),
        exact("queries", sums["queries"], [2]),
        exact("mass", sums["mass.ends"], [0.5 + 0.75]),
        relative("even attention", sums["even.ends"], [1 / 2 + 2 / 3], *tolerance),
        relative("entropy", sums["entropy"], [sum(entropies)], *tolerance),
        relative("relative entropy", sums["relative"], [1 + entropies[1] / np.log(3)], *tolerance),
        relative("update", sizes["update"], [0.5, 0.0], *tolerance),
        exact("tokens", sizes["tokens"], [1, 1]),
    ]


def check_cache(context: Context) -> list[Verdict]:
    """Greedy text with cached keys and values is that of a whole forward pass per token."""
    verdicts = []
    for name, spec in small_models.specs().items():
        if spec.head != "causal":
            continue
        model = Model(spec, small_models.build(name).params, dtype="float64")
        start = np.arange(6).reshape(2, 3) % spec.vocab
        text = start
        for _ in range(spec.length - 3):
            logits = model.forward({"tokens": text, "mask": np.ones(text.shape, bool)})
            text = np.concatenate([text, logits[:, -1].argmax(-1)[:, None]], axis=1)
        verdicts.append(exact(name, model.generate(start, spec.length - 3, lambda z: z.argmax(-1)), text))
    return verdicts


RUNS = {
    "attention": (check_probabilities, check_masks),
    "models": (check_gate_sizes, check_published_sizes),
    "optim": (check_adamw, check_clipping, check_schedules),
    "random": (check_philox, check_dropped),
    "stats": (check_statistics, check_attention),
    "generate": (check_cache,),
}


def list_cases() -> list[Case]:
    return [
        Case(group, run.__name__.removeprefix("check_"), "ref", run) for group, runs in RUNS.items() for run in runs
    ]
