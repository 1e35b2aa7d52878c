"""Time of a training step, always as a ratio to another measured in the same run, the two taken in turns.

    python benchmarks/training_step.py                     # opt-tiny and bert-tiny, 16 x 128 tokens
    python benchmarks/training_step.py --model bert-base --batch 4 --rounds 7
    python benchmarks/training_step.py --reference         # also the NumPy reference against torch

Rows: each attention against vanilla (fused attention); vanilla against a model of the same shape written by hand in
plain `torch.nn`, which must give the same logits first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qtx_ref.backend
import qtx_torch.backend
from qtx.data import load
from qtx.report.tables import format_table
from qtx_ref.models.initial import init_params
from qtx_ref.presets import attention, preset
from qtx_ref.spec import ModelSpec, OptimSpec

OPTIM = OptimSpec(lr=1e-3, steps=1000)


class PlainBlock(nn.Module):
    """A transformer block as one writes it without qtx."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        d, self.heads, self.pre, self.causal = spec.width, spec.heads, spec.pre_norm, spec.causal
        self.query, self.key, self.value, self.output = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, spec.hidden), nn.Linear(spec.hidden, d)
        self.norm1, self.norm2 = nn.LayerNorm(d, spec.norm_eps), nn.LayerNorm(d, spec.norm_eps)
        self.activation = {"gelu": F.gelu, "relu": F.relu}[str(spec.activation)]

    def attend(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.output(
            F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(b, t, d)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.attend(self.norm1(x))
            return x + self.down(self.activation(self.up(self.norm2(x))))
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.down(self.activation(self.up(x))))


class Plain(nn.Module):
    """BERT with its MLM head, or OPT, with plain attention and without padding."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        d = spec.width
        self.bert, self.offset = not spec.causal, spec.position_offset
        self.token, self.position = nn.Embedding(spec.vocab, d), nn.Embedding(spec.length + self.offset, d)
        self.blocks = nn.ModuleList(PlainBlock(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(d, spec.norm_eps)
        if self.bert:
            self.kinds, self.transform = nn.Embedding(spec.types, d), nn.Linear(d, d)
            self.head_norm, self.bias = nn.LayerNorm(d, spec.norm_eps), nn.Parameter(torch.zeros(spec.vocab))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]) + self.offset)
        if self.bert:
            x = self.norm(x + self.kinds(torch.zeros_like(tokens)))
        for block in self.blocks:
            x = block(x)
        if self.bert:
            x = self.head_norm(F.gelu(self.transform(x)))
            return F.linear(x, self.token.weight, self.bias)
        return F.linear(self.norm(x), self.token.weight)

    def load(self, p: dict[str, np.ndarray]) -> None:
        names = {"token.weight": "embed.token.weight", "position.weight": "embed.position.weight"}
        norm = "embed.norm" if self.bert else "final.norm"
        names |= {f"norm.{kind}": f"{norm}.{kind}" for kind in ("weight", "bias")}
        if self.bert:
            names |= {"kinds.weight": "embed.type.weight", "bias": "head.decoder.bias"}
            for mine, theirs in (("transform", "head.transform"), ("head_norm", "head.norm")):
                names |= {f"{mine}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
        parts = {"up": "ffn.hidden", "down": "ffn.output", "norm1": "attn.norm", "norm2": "ffn.norm"}
        parts |= {part: f"attn.{part}" for part in ("query", "key", "value", "output")}
        for i in range(len(self.blocks)):
            for mine, theirs in parts.items():
                for kind in ("weight", "bias"):
                    names[f"blocks.{i}.{mine}.{kind}"] = f"layer.{i}.{theirs}.{kind}"
        self.load_state_dict({mine: torch.from_numpy(p[theirs]) for mine, theirs in names.items()})


def plain_step(spec: ModelSpec, params: dict[str, np.ndarray], batch: dict[str, np.ndarray]) -> Callable[[], None]:
    """One step of the plain model: loss, gradients, clipping, fused AdamW. Refuses to time other logits than ours."""
    model = Plain(spec)
    model.load(params)
    decayed = [p for n, p in model.named_parameters() if n.endswith("weight") and "norm" not in n]
    rest = [p for n, p in model.named_parameters() if not (n.endswith("weight") and "norm" not in n)]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=OPTIM.lr, weight_decay=OPTIM.weight_decay, fused=True)
    tokens, targets = torch.from_numpy(batch["tokens"]), torch.from_numpy(batch["targets"])
    with torch.no_grad():
        ours = qtx_torch.backend.Model(spec, params).forward(batch)
        gap = float(np.abs(model(tokens).numpy() - ours).max())
    if gap > 1e-4:
        raise SystemExit(f"the plain model's logits differ by {gap}: nothing is timed before parity")

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(tokens).reshape(-1, spec.vocab), targets.reshape(-1), ignore_index=-1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        adam.step()
        loss.item()

    return step


def time_steps(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, in turns. Each is taken twice and the second counts, so that all follow their own kind."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def full_batch(spec: ModelSpec, size: int) -> dict[str, np.ndarray]:
    """Bundled text without padding, cut to the data's vocabulary."""
    batches = load("books", spec).train_batches(spec, size, seed=0)
    return next(batch for batch in batches if batch["mask"].all())


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, default=("opt-tiny", "bert-tiny"), show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--rounds", default=31, show_default=True)
@click.option("--attention", "kinds", multiple=True, default=("vanilla", "clipped", "gated"), show_default=True)
@click.option("--reference", is_flag=True, help="Also time the NumPy reference.")
def main(models: tuple[str, ...], batch: int, rounds: int, kinds: tuple[str, ...], reference: bool) -> None:
    rows = []
    for name in models:
        # at the length that the figures are asked for, and without dropout, which would unfuse vanilla attention
        base = replace(preset(name), length=128, dropout=0.0, attention_dropout=0.0)
        steps: dict[str, Callable[[], None]] = {}
        data = full_batch(base, batch)
        for kind in kinds:
            spec = replace(base, attention=attention(kind))
            params = init_params(spec, 0)
            trainer = qtx_torch.backend.Trainer(qtx_torch.backend.Model(spec, params), OPTIM)
            steps[kind] = lambda trainer=trainer, data=data: trainer.step(data)
        if "vanilla" in kinds:
            steps["plain torch.nn"] = plain_step(base, init_params(base, 0), data)
            if reference:
                numpy_trainer = qtx_ref.backend.Trainer(qtx_ref.backend.Model(base, init_params(base, 0)), OPTIM)
                steps["reference"] = lambda trainer=numpy_trainer, data=data: trainer.step(data)
        times = time_steps(steps, rounds)
        middle = {kind: statistics.median(seconds) for kind, seconds in times.items()}
        for kind, seconds in middle.items():
            against = "plain torch.nn" if kind == "vanilla" else "vanilla"
            ratios = [a / b for a, b in zip(times[kind], times[against], strict=True)]
            rows.append(
                [
                    f"{name} {kind}",
                    f"{1000 * seconds:.1f}",
                    against,
                    f"{seconds / middle[against]:.3f}",
                    f"{statistics.median(ratios):.3f}",
                ]
            )
    print(
        format_table(
            [f"batch {batch} x 128, {torch.get_num_threads()} threads", "ms", "against", "ratio", "median of ratios"],
            rows,
        )
    )


if __name__ == "__main__":
    main()
