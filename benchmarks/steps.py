"""Models, batches and training steps that benchmarks share: ours, and those of `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qtx_ref.backend
import qtx_torch.backend
from qtx.hub.config import write_config
from qtx.hub.names import lengthen_name, list_shapes, name_parameters
from qtx.recipes.named import resolve, training_recipe
from qtx_ref.presets import attention, preset
from qtx_ref.random import stream
from qtx_ref.spec import ModelSpec, OptimSpec, StepSpec

from .harness import near

Step = Callable[[], None]
Arrays = dict[str, np.ndarray]

OPTIM = OptimSpec(lr=1e-4, steps=1_000_000, warmup=10_000)


def shape(name: str, dropout: float, layers: int = 0, kind: str = "vanilla") -> ModelSpec:
    """A preset with one rate of dropout everywhere; `layers`: not as many as it has; `kind` of attention."""
    spec = preset(name)
    changes = {"layers": layers or spec.layers, "attention": attention(kind)}
    return replace(spec, dropout=dropout, attention_dropout=dropout, **changes)


def random_batch(spec: ModelSpec, size: int, length: int) -> Arrays:
    """Rows without padding; 15 % of the tokens are targets."""
    rng = stream(0, "benchmark")
    tokens = rng.integers(0, spec.vocab, (size, length))
    targets = np.where(rng.random(tokens.shape) < 0.15, tokens, -1)
    return {"tokens": tokens, "types": np.zeros_like(tokens), "mask": np.ones(tokens.shape, bool), "targets": targets}


def make_trainer(
    spec: ModelSpec,
    params: Arrays,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    quant: str = "",
    compiled: bool = False,
) -> qtx_torch.backend.Trainer:
    """Our trainer as `qtx train` makes it; `quant` as `--train-quant`."""
    model = qtx_torch.backend.Model(spec, params, device=device, dtype=dtype)
    if quant:
        model.bind(resolve(training_recipe(quant, spec), spec), {})
    return qtx_torch.backend.Trainer(model, OPTIM, step=StepSpec(compiled=compiled))


def make_transformers(spec: ModelSpec, params: Arrays, device: str = "cpu") -> nn.Module:
    """BertForMaskedLM of the same shape and parameters, with its fused attention."""
    import transformers

    config = write_config(spec, "float32", {}.fromkeys(("pad", "cls", "sep")), None)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**config, attn_implementation="sdpa"))
    plain, shapes = name_parameters(spec), list_shapes(spec)
    tensors = {lengthen_name(spec, plain[k]): torch.from_numpy(v.reshape(shapes[k])) for k, v in params.items()}
    model.load_state_dict(tensors, strict=False)  # the decoder is tied; `compare_logits` would show what is missing
    return model.to(device)


def torch_step(model: nn.Module, batch: Arrays, dtype: str = "float32", compiled: bool = False) -> Step:
    """One step as ours of a model that takes tokens and gives logits: the same loss, clipping and AdamW with the same
    decay, its kernel fused."""
    device = next(model.parameters()).device
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=OPTIM.lr, weight_decay=OPTIM.weight_decay, fused=True)
    model.train()
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        tokens, targets = (torch.from_numpy(batch[name]).to(device) for name in ("tokens", "targets"))
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = read_logits(forward(tokens))
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        adam.step()
        adam.zero_grad()
        loss.item()

    return step


def read_logits(output: Any) -> Tensor:
    """What a model gave: logits, or what `transformers` wraps them in."""
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def compare_logits(ours: qtx_torch.backend.Model, theirs: nn.Module, batch: Arrays) -> str:
    """Says how near the logits are. Raises Differ."""
    theirs.eval()
    tokens = torch.from_numpy(batch["tokens"]).to(ours.device)
    with torch.autocast(ours.device.type, torch.bfloat16, enabled=ours.dtype == "bfloat16"):
        logits = read_logits(theirs(tokens))
    # logits of first parameters are below 4
    return near(logits, ours.forward(batch), 0.1 if ours.dtype == "bfloat16" else 1e-4, "logits")


def compare_reference(spec: ModelSpec, params: Arrays, batch: Arrays) -> str:
    """Says how near torch's output is to the reference's, which itself is held to published models. Raises Differ."""
    ours = qtx_torch.backend.Model(spec, params).forward(batch)
    return near(ours, qtx_ref.backend.Model(spec, params).forward(batch), 1e-4, "to the reference")
