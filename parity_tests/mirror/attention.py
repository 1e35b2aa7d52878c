"""torch's softmax variants and gates against the reference in float64, value and gradient, fused kernel, tiles and
decomposed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from parity_tests.mirror.ops import errors
from parity_tests.proof.case import Case, Context
from parity_tests.proof.evaluate_torch import array, tensor
from parity_tests.proof.verdict import Verdict, equal, exact
from parity_tests.subjects import plain_torch
from parity_tests.subjects.attentions import (
    GATES,
    SITUATIONS,
    SOFTMAXES,
    GateInputs,
    attention_inputs,
    gate_inputs,
)
from qtx_ref import attention as ref_attention
from qtx_ref import random
from qtx_ref.numerics import Float as RefFloat
from qtx_ref.spec import AttentionSpec, Family, Gate, Head, ModelSpec
from qtx_ref.tape import Var
from qtx_torch import attention
from qtx_torch.models.block import Attention
from qtx_torch.models.gate import gate
from qtx_torch.numerics import Float, Record
from qtx_torch.sites import name_sites

BOUND = 16.0, "two products of n <= 64 with a softmax between; a sink's gradient adds up rows that cancel"


def build_attention(spec: ModelSpec, context: Context) -> Attention:
    made = Attention(spec)
    name_sites(made)
    return made.to(context.device, getattr(torch, context.dtype))


def put_value(net: nn.Module, path: str, value: Tensor) -> None:
    """Puts a tensor, with its gradient, in a parameter's place."""
    owner, _, name = path.rpartition(".")
    site = net.get_submodule(owner)
    site._parameters.pop(name, None)
    setattr(site, name, value)


def model_spec(spec: AttentionSpec, heads: int, width: int) -> ModelSpec:
    shape = {"layers": 1, "heads": heads, "width": heads * width, "hidden": 1, "vocab": 1, "length": 1, "types": 1}
    return ModelSpec(Family.BERT, **shape, head=Head.NONE, attention=spec)


def check_attention(softmax: str, situation: str, decomposed: bool, context: Context) -> list[Verdict]:
    inputs = attention_inputs(softmax, situation, 8)
    batch, heads, tokens, width = inputs.leaves["q"].shape
    attn = build_attention(model_spec(inputs.spec, heads, width), context)
    seen: list[str] = []
    if decomposed:  # whoever watches the probabilities gets them
        attn.probs.on_output = Record("probs", lambda site, x, where: seen.append(site))
    rows = None if inputs.rows is None else tensor(inputs.rows, context)
    mask = tensor(inputs.mask, context)

    def call(x: dict[str, Tensor]) -> Tensor:
        if "sink" in x:
            put_value(attn, "probs.sink", x["sink"])
        made = attention.make_mask(rows, tokens, tokens, situation == "causal", x["q"])
        return Float().attention(attn, x["q"], x["k"], x["v"], made, inputs.spec, 0.0)

    def plain(x: dict[str, Tensor]) -> Tensor:
        wide = mask.expand(batch, 1, tokens, tokens)
        return plain_torch.attention(x["q"], x["k"], x["v"], wide, inputs.spec, x.get("sink"))

    verdicts = errors(call, plain, inputs.reference, inputs.leaves, BOUND, context)
    return [*verdicts, equal("probabilities were shown", bool(seen), True)] if decomposed else verdicts


def check_tiles(softmax: str, situation: str, rate: float, context: Context) -> list[Verdict]:
    """Attention without a tensor of T x T: tiles of 7 rows of one head, and of two of three heads; with dropout, of
    rows that are not the first of their batch."""
    inputs = attention_inputs(softmax, situation, 8)
    batch, heads, tokens, _ = inputs.leaves["q"].shape
    rows = None if inputs.rows is None else tensor(inputs.rows, context)
    seed, step, first_row, share = 3, 5, 2, 1 / (1 - rate)
    first = first_row * heads * tokens * tokens
    drop = attention.Drop(seed, step, "a.probs", rate, first) if rate else None
    keep = random.keep_mask(seed, step, "a.probs", (batch, heads, tokens, tokens), rate, first)

    def call(block: int, x: dict[str, Tensor]) -> Tensor:
        made = attention.make_mask(rows, tokens, tokens, situation == "causal", x["q"])
        return (
            attention.attend_tiled(x["q"], x["k"], x["v"], made, inputs.spec, x.get("sink"), drop, block=block)
            .transpose(1, 2)
            .flatten(2)
        )

    def plain(x: dict[str, Tensor]) -> Tensor:
        wide = tensor(inputs.mask, context).expand(batch, 1, tokens, tokens)
        scores = x["q"] @ x["k"].mT / x["q"].shape[-1] ** 0.5
        probs = plain_torch.probabilities(scores, wide, inputs.spec, x.get("sink"))
        return (probs * tensor(keep, context) * share @ x["v"]).transpose(1, 2).flatten(2)

    def reference(x: dict[str, Var]) -> Var:
        nx = RefFloat(training=True, seed=seed, step=step, first_row=first_row)
        nx.load({"a.probs.sink": x["sink"]} if "sink" in x else {})
        return nx.attention("a", x["q"], x["k"], x["v"], inputs.mask, inputs.spec, rate)

    blocks = {"rows": 7 * tokens, "heads": 2 * tokens * tokens}
    return [
        replace(verdict, what=f"{verdict.what}, tiles of {name}")
        for name, block in blocks.items()
        for verdict in errors(partial(call, block), plain, reference, inputs.leaves, BOUND, context)
        if name == "rows" or verdict.what.startswith("torch")
    ]


def check_gate(kind: Gate, context: Context) -> list[Verdict]:
    inputs: GateInputs = gate_inputs(kind, 8)
    attn, rows = build_attention(inputs.spec, context), tensor(inputs.rows, context)

    def call(x: dict[str, Tensor]) -> Tensor:
        for name, value in x.items():
            if name.startswith("layer.0.attn."):
                put_value(attn, name.removeprefix("layer.0.attn."), value)
        nx = Float()
        nx.begin(rows)
        return gate(nx, attn, x["x"], x["context"], inputs.spec)

    def plain(x: dict[str, Tensor]) -> Tensor:
        return plain_torch.apply_gate(inputs.spec, x, "layer.0.attn", x["x"], x["context"], rows)

    return errors(call, plain, inputs.reference, inputs.leaves, BOUND, context)


def check_masks(context: Context) -> list[Verdict]:
    """Boolean masks, those made from them, and additive ones at the border."""
    verdicts = []
    for situation in SITUATIONS:
        inputs = attention_inputs("plain", situation, 1)
        tokens = inputs.leaves["q"].shape[2]
        rows = None if inputs.rows is None else tensor(inputs.rows, context)
        got = attention.attention_mask(rows, tokens, tokens, situation == "causal")
        verdicts.append(exact(situation, array(got), inputs.mask))
    for queries, keys in ((1, 5), (3, 5)):
        got = attention.attention_mask(None, queries, keys, True)
        verdicts.append(
            exact(f"{queries} of {keys}", array(got), ref_attention.attention_mask(None, queries, keys, True))
        )
    additive = torch.tensor([0.0, -0.0, -10000.0, -torch.inf], device=context.device)
    verdicts.append(
        exact("additive", array(attention.boolean_mask(additive)), ref_attention.boolean_mask(array(additive)))
    )
    for value in (-5000.0, 1.0, float("nan")):
        try:
            attention.boolean_mask(torch.tensor([value]))
        except ValueError:
            verdicts.append(equal(f"{value} is refused", True, True))
        else:
            verdicts.append(equal(f"{value} is refused", False, True))
    return verdicts


def list_cases() -> list[Case]:
    both = ("float32", "bfloat16")
    rows = [
        Case("attention", f"{softmax}_{at}", "torch", partial(check_attention, softmax, at, False), both)
        for softmax, at in product(SOFTMAXES, SITUATIONS)
    ]
    rows += [
        Case("attention", f"plain_{at}_decomposed", "torch", partial(check_attention, "plain", at, True), both)
        for at in SITUATIONS
    ]
    rows += [
        Case("attention", f"tiles_{softmax}_{at}_{rate}", "torch", partial(check_tiles, softmax, at, rate), both)
        for softmax, at, rate in product(SOFTMAXES, SITUATIONS, (0.0, 0.25))
    ]
    rows += [Case("attention", f"gate_{kind}", "torch", partial(check_gate, kind), both) for kind in GATES]
    return [*rows, Case("attention", "masks", "torch", check_masks)]
