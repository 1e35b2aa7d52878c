"""Attention's Triton kernels beside the reference: python -m parity_tests.long.attention_kernels [--device cuda]

Every softmax with causal masks, padding, dropout, gates, quantized scores and probabilities: values and gradients
against the reference in float64, dropout's masks to the bit. Without a GPU, in the interpreter: TRITON_INTERPRET=1.
With --arch 90 (or 80, 100) nothing is run: what the cases launch is compiled for that GPU, which needs none;
registers and spilled bytes are printed for long sequences.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from parity_tests.long import attention_compiled, attention_models
from parity_tests.long.attention_cases import SITE, Case, call, every_case, few_cases, quantizers
from parity_tests.proof import evaluate_ref
from parity_tests.proof.case import Context
from parity_tests.proof.evaluate_torch import array, round_leaves, tensor, value_and_gradients
from parity_tests.proof.verdict import EPS, Verdict, against_truth, equal, exact
from parity_tests.subjects import plain_torch
from qtx_ref import ops as ref_ops
from qtx_ref import random as ref_random
from qtx_ref.attention import attention_mask, probabilities
from qtx_ref.quant import straight_through
from qtx_ref.random import stream
from qtx_ref.spec import QuantSpec
from qtx_ref.tape import Var, const
from qtx_torch import random
from qtx_torch.kernels import attention

BITS8 = QuantSpec(bits=8)
SPACING = EPS | {"float16": 2.0**-10}
BOUND = 4.0, "scores of up to 30, in units of log2, are rounded once more; a GPU takes powers to 2 of the last places"
FLIPS = 4  # codes of scores or probabilities that float noise may turn over


def make_leaves(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """q, k, v, and the sink and gate where there are; rows of which the first sequence has most, the second few."""
    rng = stream(0, "attention kernels", case.softmax, case.queries, case.keys, case.width)
    b, h = 2, 2
    leaves = {name: rng.normal(size=(b, h, case.keys, case.width)) for name in ("k", "v")}
    leaves["q"] = 2 * rng.normal(size=(b, h, case.queries, case.width))
    if case.softmax == "sink":
        leaves["sink"] = rng.normal(size=h)
    if case.gated:
        leaves["gate"] = rng.random((b, case.queries, h))
    rows = rng.random((b, case.keys)) < np.array([[0.8], [0.2]]) if case.padded else None
    return leaves, rows


def quantize(x: Var, ends: tuple[float, int] | None) -> Var:
    if ends is None:
        return x
    return straight_through.fake_quantize(x, np.float32(ends[0]), np.int32(ends[1]), BITS8)


def refer(case: Case, x: dict[str, Var], rows: np.ndarray | None) -> Var:
    """The reference's ops, one after another."""
    coded = quantizers(case)
    scores = ref_ops.scale(ref_ops.matmul(x["q"], ref_ops.swap_last(x["k"])), case.width**-0.5)
    mask = attention_mask(rows, case.queries, case.keys, case.causal)
    probs = probabilities(quantize(scores, coded.get("scores")), mask, case.spec, x.get("sink"))
    probs = quantize(probs, coded.get("probs"))
    if case.rate:
        keep = ref_random.keep_mask(7, 3, SITE, probs.shape, case.rate, case.first)
        probs = ref_ops.mul(probs, const((keep / (1 - case.rate)).astype(probs.value.dtype)))
    context = ref_ops.merge_heads(ref_ops.matmul(probs, x["v"]))
    return ref_ops.mul(context, ref_ops.spread_heads(x["gate"], case.width)) if case.gated else context


def compose(case: Case, x: dict[str, Tensor], rows: np.ndarray | None) -> Tensor:
    """Plain torch, whose error is what ours is measured by; it quantizes nothing."""
    device = x["q"].device
    mask = torch.from_numpy(np.ascontiguousarray(attention_mask(rows, case.queries, case.keys, case.causal))).to(device)
    scores = x["q"] @ x["k"].mT * case.width**-0.5
    probs = plain_torch.probabilities(scores, mask.expand(scores.shape), case.spec, x.get("sink"))
    if case.rate:
        keep = ref_random.keep_mask(7, 3, SITE, tuple(probs.shape), case.rate, case.first)
        probs = probs * torch.from_numpy(keep).to(device) / (1 - case.rate)
    context = (probs @ x["v"]).transpose(1, 2)
    return (context * x["gate"][..., None] if case.gated else context).flatten(2)


def check(case: Case, device: str) -> Iterator[Verdict]:
    """Value and gradients against the reference in float64."""
    context = Context(device, case.dtype)
    leaves, rows = make_leaves(case)
    inputs = round_leaves(leaves, context)
    truth, true_grads = evaluate_ref.value_and_gradients(lambda x: refer(case, x, rows), inputs)
    value, grads = value_and_gradients(lambda x: call(case, x, rows), leaves, context)
    plain, plain_grads = None, dict.fromkeys(grads)
    (c, why), eps = BOUND, SPACING[case.dtype]
    if case.scores or case.probs:
        c, why = FLIPS * 2.0**-8 / eps / truth.shape[1] ** 0.5, f"{FLIPS} rows of which one code flips"
    else:
        plain, plain_grads = value_and_gradients(lambda x: compose(case, x, rows), leaves, context)
    reason, largest = f"2x plain torch, or c = {c:.3g}: {why}", max(float(np.abs(g).max()) for g in true_grads.values())
    yield against_truth(f"{case.label}: value", value, truth, eps, c, reason, plain)
    for name, g in grads.items():
        scale = None if true_grads[name].any() else largest
        if name == "sink":
            noise = EPS["float32"] * weigh_sink(case, inputs, rows, truth)
            scale = max(float(np.abs(true_grads[name]).max()), noise / (c * eps))
        yield against_truth(f"{case.label}: d{name}", g, true_grads[name], eps, c, reason, plain_grads[name], scale)


def weigh_sink(case: Case, leaves: dict[str, np.ndarray], rows: np.ndarray | None, truth: np.ndarray) -> float:
    """The magnitudes of the terms of the sink's gradient, added up: they cancel but for a few hundredths, each
    rounded to float32 by itself. They are -(1 - sum_j p_ij) r_ik O_ik, r O being the cotangent times the result."""
    ones = {name: const(np.ones_like(x) if name == "v" else x) for name, x in leaves.items()}
    received = refer(replace(case, rate=0.0, gated=False, probs=False), ones, rows).value  # (B, T, H K): sum_j p_ij
    terms = np.abs((1 - received) * evaluate_ref.cotangent(truth.shape) * truth)
    return float(terms.reshape(*terms.shape[:2], -1, case.width).sum(axis=(0, 1, 3)).max())


def check_draws(device: str) -> Iterator[Verdict]:
    """Which probabilities are kept: with equal scores and the unit matrix as values the result shows it, and so does
    the gradient of values, of another kernel."""
    for keys, first in ((64, 2**33), (64, 5), (61, 0), (61, 2**32 - 7)):
        q = torch.zeros(2, 2, keys, keys, device=device)
        v = torch.eye(keys, device=device).expand(2, 2, keys, keys).requires_grad_()
        case = Case("plain", keys, keys, keys, rate=0.3, first=first)
        y = call(case, {"q": q, "k": q, "v": v}, None).unflatten(2, (2, keys)).transpose(1, 2)
        (slope,) = torch.autograd.grad(y, v, torch.eye(keys, device=device).expand(2, 2, keys, keys))
        want = ref_random.keep_mask(7, 3, SITE, (2, 2, keys, keys), case.rate, first)
        yield exact(f"mask of {keys} keys from {first}", array(y) != 0, want)
        yield exact(f"mask of {keys} keys from {first}, going back", array(slope.mT) != 0, want)


def check_masked(device: str) -> Iterator[Verdict]:
    """What stands at padding changes no bit: NaN in keys, large numbers in values; queries without keys give zeros."""
    case = Case("clipped", 20, 36, 32, padded=True)
    leaves, rows = make_leaves(case)
    assert rows is not None
    rows[1] = False
    held = {name: tensor(value, Context(device)) for name, value in leaves.items()}
    before = array(call(case, held, rows))
    hidden = torch.from_numpy(~rows).to(device)[:, None, :, None]
    held["k"], held["v"] = held["k"].masked_fill(hidden, torch.nan), held["v"].masked_fill(hidden, 1e30)
    yield exact("masked keys and values", array(call(case, held, rows)), before)
    yield exact("a sequence without keys", np.abs(before[1]), np.zeros_like(before[1]))


def check_strides(device: str) -> Iterator[Verdict]:
    """Where numbers lie in memory changes no bit: here every second place is another's."""
    case = Case("sink", 5, 9, 16, padded=True, gated=True)
    leaves, rows = make_leaves(case)
    held = {name: tensor(value, Context(device)) for name, value in leaves.items()}
    apart = {name: torch.stack([x, x + 1], -1)[..., 0] for name, x in held.items()}
    yield exact("every second place", array(call(case, apart, rows)), array(call(case, held, rows)))


def check_faults(device: str) -> Iterator[Verdict]:
    """Planted in what the forward kernel is given or keeps, and in a gradient, and found."""
    run, back = attention.run_forward, attention.run_backward
    case = Case("clipped", 20, 36, 32, causal=True, padded=True)

    def keep_result(*given: Any) -> tuple[Tensor, ...]:  # D from O, as without a clip
        out, context, _, *rest = run(*given)
        return out, context, out, *rest

    def shift_words(*given: Any) -> tuple[Tensor, ...]:
        *before, words, train = given
        return run(*before, [*words[:-1], words[-1] + 4], train)

    def lower_gamma(*given: Any) -> tuple[Tensor, ...]:
        *before, numbers, words, train = given
        return run(*before, [*numbers[:2], numbers[2] - 1e-5, *numbers[3:]], words, train)

    def coarsen(*given: Any) -> tuple[Tensor, ...]:
        codes = given[6] * torch.tensor([1, 1, 2, 1], device=device)
        return run(*given[:6], codes, *given[7:])

    def raise_sink(*given: Any) -> tuple[Tensor, ...]:
        dq, dk, dv, d_sink, d_gate = back(*given)
        return dq, dk, dv, d_sink * (1 + 1e-4), d_gate

    faults: dict[Callable[..., Any], Case] = {
        keep_result: case,
        shift_words: replace(case, rate=0.1),
        lower_gamma: case,
        coarsen: replace(case, causal=False, probs=True),
        raise_sink: replace(case, softmax="sink"),
    }
    for fault, where in faults.items():
        with mock.patch.object(attention, "run_backward" if fault is raise_sink else "run_forward", fault):
            verdicts = list(check(where, device))
        yield equal(f"{fault.__name__} is found", all(verdict.ok for verdict in verdicts), False)
        yield from check(where, device)


def check_compiled(device: str) -> Iterator[Verdict]:
    """Every bit under the compiler, in one graph."""
    torch.compiler.assume_constant_result(random.number_site)
    case = Case("sink", 20, 36, 32, causal=True, padded=True, rate=0.2, first=4 * 20 * 36, stored=True, gated=True)
    leaves, rows = make_leaves(case)
    compiled = torch.compile(lambda x: call(case, x, rows), backend="aot_eager", fullgraph=True)
    results = [value_and_gradients(run, leaves, Context(device)) for run in (compiled, lambda x: call(case, x, rows))]
    (value, grads), (want, true_grads) = results
    yield exact("compiled value", value, want)
    for name, g in grads.items():
        yield exact(f"compiled gradient of {name}", g, true_grads[name])


def multiply_bfloat16() -> None:
    """Triton's interpreter multiplies what stands for bfloat16, its bits; from here on the numbers."""
    from triton import language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def widen(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.data.dtype != np.uint16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *how):  # type: ignore[no-untyped-def]
        return original(self, widen(a), widen(b), d, *how)

    interpreter.InterpreterBuilder.create_dot = create_dot


def run(device: str, few: bool) -> bool:
    """Prints what fails and what came nearest to it; whether nothing failed."""
    count, failed, worst = 0, 0, None
    names = attention_models.NAMES[:1] if few else attention_models.NAMES
    cases = (check(case, device) for case in (few_cases() if few else every_case()))
    others = (check_draws, check_masked, check_strides, check_faults, check_compiled)
    for verdicts in (
        *(other(device) for other in others),
        attention_models.check_models(device, names),
        attention_models.check_compiled(device),
        *cases,
    ):
        for verdict in verdicts:
            count, failed = count + 1, failed + (not verdict.ok)
            if not verdict.ok:
                print(f"FAILED {verdict.what}: {verdict.error:.3g}, at most {verdict.tolerance:.3g}", flush=True)
            if worst is None or verdict.strain > worst.strain:
                worst = verdict
    assert worst is not None
    print(f"{count} comparisons, {failed} failed; nearest: {worst.what}, {worst.strain:.2f} of its bound")
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--few", action="store_true", help="each variant once")
    parser.add_argument("--arch", type=int, help="compile for it instead: 80, 90, 100")
    options = parser.parse_args()
    if options.arch:
        return attention_compiled.report(options.arch, options.few)
    if options.device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("on a CPU kernels run in Triton's interpreter: set TRITON_INTERPRET=1")
        multiply_bfloat16()
    return 0 if run(options.device, options.few) else 1


if __name__ == "__main__":
    sys.exit(main())
