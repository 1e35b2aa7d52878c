"""What the published code begins training with, beside ours: `python -m parity_tests.long.published_start`.

Bondarenko et al. 2023 let transformers build BERT or OPT from a configuration and put attention of their own in place
of each layer's. Here the same is done with the installed transformers: configurations with the published values,
attention that holds the layers which theirs makes. Mean, standard deviation and kurtosis of every tensor over five
seeds are compared with those of `init_params` under `start = "published"`, within their sampling error; exit status 1
where one is outside. `--write FILE` keeps the published figures, which is how the fixture of the tests was made.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from qtx.hub.names import name_parameters, shorten_name
from qtx_ref.models.initial import first_value, shapes
from qtx_ref.presets import attention, preset
from qtx_ref.spec import AttentionSpec, Family, Gate, ModelSpec, Start

SEEDS = 5
SIGMAS = 5.0  # one in 1.7 million by chance for a normal statistic; about 600 are compared
MANY = 10_000  # values from which a kurtosis is nearly normal and is compared too
Figures = dict[str, dict[str, Any]]
# what model_configs/opt-*.yaml change of OPTConfig(): word_embed_proj_dim stays 768, the default width
OPT_YAML = {
    "opt-125m": {
        "max_position_embeddings": 512,
        "ffn_dim": 3072,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "init_std": 0.006,
        "dropout": 0.1,
    },
    "opt-350m": {
        "max_position_embeddings": 1024,
        "ffn_dim": 4096,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "init_std": 0.006,
        "dropout": 0.1,
    },
    "opt-1.3b": {
        "max_position_embeddings": 1024,
        "ffn_dim": 8192,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "init_std": 0.006,
        "dropout": 0.1,
    },
}


@dataclass(frozen=True)
class Measured:
    """A published shape with few layers, and the attention of one of its commands."""

    shape: str  # bert-base, or a key of OPT_YAML
    attention: str = "vanilla"
    layers: int = 1

    @property
    def spec(self) -> ModelSpec:
        """Ours."""
        shape = preset("bert-base" if self.shape == "bert-base" else f"paper-{self.shape}")
        return replace(shape, layers=self.layers, attention=attention(self.attention), start=Start.PUBLISHED)

    @property
    def names(self) -> list[str]:
        """The tensors that are measured: all, or those of attention where another row has the rest."""
        first = next(case for case in CASES if case.shape == self.shape)
        return [name for name in shapes(self.spec) if self == first or ".attn." in name]


CASES = (
    Measured("bert-base", layers=2),
    Measured("bert-base", "mlp"),
    Measured("bert-base", "head"),
    Measured("opt-125m", layers=2),
    Measured("opt-125m", "gated:pi=0.25"),
    Measured("opt-350m", "gated:pi=0.25"),
    Measured("opt-1.3b", "all_features"),
)


class Attention(nn.Module):
    """The parameters of the attention that the published code puts in: none is drawn again after torch has."""

    def __init__(self, linears: tuple[str, ...], width: int, heads: int, kind: AttentionSpec) -> None:
        super().__init__()
        for name in linears:
            self.add_module(name, nn.Linear(width, width))
        k = width // heads
        self.alpha: nn.Module | nn.Parameter | None = None
        if kind.gate is Gate.HEAD:
            self.alpha = nn.Parameter(torch.zeros(heads))
        elif kind.gate is Gate.ALL_FEATURES:
            self.alpha = nn.Linear(width, heads)
        elif kind.gate is Gate.MLP:
            parts = (nn.Sequential(nn.Linear(k, k // 4), nn.ReLU(), nn.Linear(k // 4, 1)) for _ in range(heads))
            self.alpha = nn.ModuleList(parts)
        elif kind.gate is Gate.LINEAR:
            self.alpha = nn.ModuleList([nn.Linear(k, 1) for _ in range(heads)])
            pi = kind.pi or 0.5  # --attn_gate_init
            for part in self.alpha:
                nn.init.constant_(part.bias, math.log(pi / (1 - pi)))


def configure(shape: str, layers: int | None = None) -> Any:
    """The configuration that the published command reaches; layers: instead of all."""
    if shape == "bert-base":
        config: Any = transformers.BertConfig()  # equal to bert-base-uncased's
    else:
        config = transformers.OPTConfig()
        for key, value in OPT_YAML[shape].items():
            setattr(config, key, value)
    if layers is not None:
        config.num_hidden_layers = layers
    return config


def build_published(shape: str, kind: AttentionSpec, layers: int | None = None) -> nn.Module:
    """The model as the published code has it when the first step begins; torch's seed decides the values."""
    config = configure(shape, layers)
    size = config.hidden_size, config.num_attention_heads, kind
    if shape == "bert-base":
        model: Any = transformers.BertForMaskedLM(config)
        for layer in model.bert.encoder.layer:
            layer.attention.self = Attention(("query", "key", "value"), *size)
    else:
        model = transformers.OPTForCausalLM(config)
        for layer in model.model.decoder.layers:
            layer.self_attn = Attention(("k_proj", "v_proj", "q_proj", "out_proj"), *size)
    return model


def name_ours(model: nn.Module, spec: ModelSpec) -> Iterator[tuple[str, list[str]]]:
    """Each parameter of ours, with the names of those of the published model that it stacks, head by head."""
    theirs = {shorten_name(spec.family, name): name for name, _ in model.named_parameters()}
    plain = replace(spec, attention=AttentionSpec())
    for ours, name in name_parameters(plain).items():
        yield ours, [theirs.pop(name)]
    where = "attention.self" if spec.family is Family.BERT else "self_attn"
    parts = {"gate_hidden": ".0", "gate_logit": ".2" if spec.attention.gate is Gate.MLP else ""}
    for ours in shapes(spec).keys() - shapes(plain).keys():
        _, index, _, part, kind = ours.split(".")
        stem = f"{'encoder.layer' if spec.family is Family.BERT else 'layers'}.{index}.{where}.alpha"
        by_head = [f"{stem}.{head}{parts[part]}.{kind}" for head in range(spec.heads)]
        names = next(n for n in (by_head, [f"{stem}.{kind}"], [stem]) if n[0] in theirs)
        yield ours, [theirs.pop(name) for name in names]
    if theirs:
        raise RuntimeError(f"the published model has parameters that ours lacks: {', '.join(theirs)}")


class Moments:
    """Statistics of one tensor over seeds, of which only sums are kept."""

    def __init__(self) -> None:
        self.count, self.center, self.sums = 0, 0.0, np.zeros(5)
        self.zero_rows: set[int] | None = None

    def add(self, value: np.ndarray) -> None:
        if self.count == 0:
            self.center = float(value.mean(dtype=np.float64))
        self.count += value.size
        for part in np.array_split(value.ravel(), 1 + value.size // 2**22):
            x = part.astype(np.float64) - self.center
            self.sums[1:] += [x.sum(), (x**2).sum(), (x**3).sum(), (x**4).sum()]
        zero = set(np.flatnonzero((value == 0).all(axis=1)).tolist()) if value.ndim == 2 else set()
        self.zero_rows = zero if self.zero_rows is None else self.zero_rows & zero

    def summarize(self) -> dict[str, Any]:
        """How many values, their mean, std and kurtosis m4 / m2^2, and the rows that are 0 in every seed."""
        _, shift, square, cube, fourth = self.sums / self.count
        variance = square - shift**2
        constant = variance < 1e-24  # float32 values of a distribution differ by more
        central = fourth - 4 * shift * cube + 6 * shift**2 * square - 3 * shift**4
        return {
            "count": self.count,
            "mean": float(self.center + shift),
            "std": 0.0 if constant else math.sqrt(variance),
            "kurtosis": 0.0 if constant else float(central / variance**2),
            "zero_rows": sorted(self.zero_rows or ()),
        }


def measure_published(case: Measured) -> Figures:
    """Of the published model's tensors, by our names."""
    moments = {name: Moments() for name in case.names}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model = build_published(case.shape, attention(case.attention), case.layers)
        tensors = {name: value.detach().numpy() for name, value in model.named_parameters()}
        for ours, names in name_ours(model, case.spec):
            if ours in moments:
                value = tensors[names[0]] if len(names) == 1 else np.stack([tensors[name] for name in names])
                moments[ours].add(value.reshape(shapes(case.spec)[ours]))
    return {name: m.summarize() for name, m in moments.items()}


def measure_ours(spec: ModelSpec, names: list[str], seeds: int = SEEDS) -> Figures:
    """Of what `init_params` gives for a spec, one tensor at a time."""
    figures = {}
    for name in names:
        moments = Moments()
        for seed in range(seeds):
            moments.add(first_value(spec, name, shapes(spec)[name], seed))
        figures[name] = moments.summarize()
    return figures


def compare(published: Mapping[str, Mapping[str, Any]], ours: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What of ours is outside the sampling error, in words.

    With n and m values of standard deviation s and kurtosis k: a mean's error is s sqrt(1/n + 1/m), a standard
    deviation's s sqrt((k - 1) / 4 (1/n + 1/m)), a kurtosis' at most that of normal values, sqrt(24 (1/n + 1/m)).
    """
    wrong = [f"{name}: only on one side" for name in published.keys() ^ ours.keys()]
    for name in published.keys() & ours.keys():
        p, o = published[name], ours[name]
        per_value = 1 / p["count"] + 1 / o["count"]
        bounds = {
            "mean": p["std"] * math.sqrt(per_value),
            "std": p["std"] * math.sqrt(max(p["kurtosis"] - 1, 0) / 4 * per_value),
        }
        if o["count"] >= MANY and p["std"]:
            bounds["kurtosis"] = math.sqrt(24 * per_value)
        for key, error in bounds.items():
            if abs(p[key] - o[key]) > SIGMAS * error:
                wrong.append(f"{name}: {key} {o[key]:.6g}, published {p[key]:.6g} +- {error:.2g}")
        if p["zero_rows"] != o["zero_rows"]:
            wrong.append(f"{name}: rows {o['zero_rows']} are 0, published {p['zero_rows']}")
    return sorted(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the published figures as JSON")
    out = parser.parse_args().write
    kept: dict[str, Figures] = {}
    wrong = 0
    print("| shape, attention | tensor | values | published mean | ours | published std | ours |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for case in CASES:
        published, ours = measure_published(case), measure_ours(case.spec, case.names)
        kept[f"{case.shape} {case.attention}"] = published
        for name, p in published.items():
            o, where = ours[name], f"{case.shape}, {case.attention}"
            if name.startswith("layer.1."):
                continue  # as layer 0
            means = f"{p['mean']:+.2e} | {o['mean']:+.2e}"
            print(f"| {where} | {name} | {p['count']:,} | {means} | {p['std']:.6f} | {o['std']:.6f} |")
        for line in compare(published, ours):
            wrong += 1
            print(f"{case.shape}, {case.attention}: {line}", file=sys.stderr)
    if out:
        about = {"transformers": transformers.__version__, "torch": torch.__version__, "seeds": SEEDS}
        out.write_text(json.dumps({"made_by": about, "cases": kept}, indent=1) + "\n")
    print(f"{wrong} of {sum(map(len, kept.values()))} tensors' statistics are outside {SIGMAS:g} sampling errors")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
