"""Training steps that are timed against each other, ours and those of `transformers`, and how that is done."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qtx_torch.backend
from qtx.hub.config import write_config
from qtx.hub.names import lengthen_name, list_shapes, name_parameters
from qtx.recipes.named import resolve, training_recipe
from qtx_ref.presets import preset
from qtx_ref.random import stream
from qtx_ref.spec import ModelSpec, OptimSpec, StepSpec

Step = Callable[[], None]
Arrays = dict[str, np.ndarray]

OPTIM = OptimSpec(lr=1e-4, steps=1_000_000, warmup=10_000)


def shape(name: str, dropout: float, layers: int = 0) -> ModelSpec:
    """A preset with one rate of dropout everywhere; `layers`: not as many as it has."""
    spec = preset(name)
    return replace(spec, dropout=dropout, attention_dropout=dropout, layers=layers or spec.layers)


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


def make_theirs(spec: ModelSpec, params: Arrays, device: str = "cpu") -> nn.Module:
    """BertForMaskedLM of the same shape and parameters, with its fused attention."""
    import transformers

    config = write_config(spec, "float32", {}.fromkeys(("pad", "cls", "sep")), None)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**config, attn_implementation="sdpa"))
    plain, shapes = name_parameters(spec), list_shapes(spec)
    tensors = {lengthen_name(spec, plain[k]): torch.from_numpy(v.reshape(shapes[k])) for k, v in params.items()}
    model.load_state_dict(tensors, strict=False)  # the decoder is tied; `compare_logits` would show what is missing
    return model.to(device)


def their_step(model: nn.Module, batch: Arrays, dtype: str = "float32") -> Step:
    """One step as ours: the same loss, clipping and AdamW with the same decay, its kernel fused."""
    device = next(model.parameters()).device
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=OPTIM.lr, weight_decay=OPTIM.weight_decay, fused=True)
    model.train()

    def step() -> None:
        tokens, targets = (torch.from_numpy(batch[name]).to(device) for name in ("tokens", "targets"))
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(input_ids=tokens).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        adam.step()
        adam.zero_grad()
        loss.item()

    return step


@torch.no_grad()
def compare_logits(ours: qtx_torch.backend.Model, theirs: nn.Module, batch: Arrays) -> float:
    """The largest difference in logits; nothing is timed before it is small."""
    theirs.eval()
    tokens = torch.from_numpy(batch["tokens"]).to(ours.device)
    with torch.autocast(ours.device.type, torch.bfloat16, enabled=ours.dtype == "bfloat16"):
        logits: Tensor = theirs(input_ids=tokens).logits
    gap = float(np.abs(logits.float().cpu().numpy() - ours.forward(batch)).max())
    limit = 0.1 if ours.dtype == "bfloat16" else 1e-4  # logits of first parameters are below 4
    if not gap < limit:
        raise SystemExit(f"logits differ by {gap}: nothing is timed before they agree")
    return gap


def time_steps(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, in turns. Each is taken twice and the second counts, so that all follow their own kind.
    A step ends by reading its loss, which waits for the device. On one thread of a CPU they are the process's own
    seconds, to which others on the machine add little."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            begin = clock()
            step()
            seconds[name].append(clock() - begin)
    return seconds


def ratios(times: dict[str, list[float]], name: str, against: str) -> tuple[float, float, float]:
    """Median, lowest and highest of the ratios of the rounds."""
    each = [a / b for a, b in zip(times[name], times[against], strict=True)]
    return statistics.median(each), min(each), max(each)
