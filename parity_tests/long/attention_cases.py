"""What attention's kernels are tried on, and how they are called; see `attention_kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from parity_tests.subjects.attentions import SOFTMAXES
from qtx_ref.spec import AttentionSpec
from qtx_torch import random
from qtx_torch.kernels import attention

SITE = "layer.0.attn.probs"


@dataclass(frozen=True)
class Case:
    softmax: str
    queries: int
    keys: int
    width: int
    causal: bool = False
    padded: bool = False
    rate: float = 0.0
    first: int = 0
    stored: bool = False  # step and first word are tensors
    gated: bool = False
    scores: bool = False  # quantized
    probs: bool = False
    dtype: str = "float32"

    @property
    def spec(self) -> AttentionSpec:
        return SOFTMAXES[self.softmax]

    @property
    def label(self) -> str:
        flags = [name for name in ("causal", "padded", "stored", "gated", "scores", "probs") if getattr(self, name)]
        flags += [f"dropout {self.rate} from {self.first}"] if self.rate else []
        return " ".join([self.softmax, f"{self.queries}x{self.keys}x{self.width}", self.dtype, *flags])


SIZES = ((37, 37, 32), (70, 70, 32), (20, 68, 80), (40, 30, 32), (1, 33, 64), (130, 96, 128))


def every_case() -> Iterator[Case]:
    """All softmaxes, sizes, masks, draws and gates in float32; 16 bits, and what is quantized, in fewer sizes."""
    for softmax, size, causal, padded, drawn, gated in product(SOFTMAXES, SIZES, *[(False, True)] * 4):
        yield Case(softmax, *size, causal, padded, 0.2 * drawn, 2**33 + 3 * (size[1] % 4), gated=gated)
    for softmax, dtype, size in product(SOFTMAXES, ("bfloat16", "float16"), SIZES[1:3]):
        yield Case(softmax, *size, causal=True, padded=True, rate=0.2, gated=True, dtype=dtype)
        yield Case(softmax, *size, dtype=dtype)
    for softmax, scores, probs, size in product(SOFTMAXES, (False, True), (False, True), SIZES[1:3]):
        for drawn in (False, True) if scores or probs else ():
            yield Case(
                softmax, *size, causal=drawn, padded=True, rate=0.2 * drawn, gated=drawn, scores=scores, probs=probs
            )
    for softmax in SOFTMAXES:
        yield Case(softmax, 20, 68, 32, rate=0.3, first=2 * 20 * 68 * 5, stored=True)


def few_cases() -> Iterator[Case]:
    """Each softmax and each of the rest at least once."""
    yield Case("plain", 37, 37, 32, causal=True, rate=0.2, first=2**33 + 3, gated=True)
    yield Case("plain", 1, 33, 64)
    yield Case("clipped", 37, 37, 32)
    yield Case("clipped", 20, 68, 80, causal=True, padded=True, rate=0.2, first=2**33, gated=True)
    yield Case("clipped", 20, 68, 32, rate=0.3, first=2 * 20 * 68 * 5, stored=True)
    yield Case("clipped", 40, 30, 32, causal=True, dtype="bfloat16", gated=True)
    yield Case("clipped", 35, 36, 32, padded=True, scores=True, probs=True, gated=True)
    yield Case("clipped", 130, 150, 16, causal=True)  # several blocks of both, some of which need no mask
    yield Case("clipped_row", 37, 37, 32)
    yield Case("clipped_row", 40, 30, 32, causal=True, padded=True)
    yield Case("clipped_row", 37, 37, 80, dtype="float16", rate=0.2, first=1)
    yield Case("softmax1", 37, 37, 32, padded=True, probs=True, rate=0.2)
    yield Case("sink", 37, 37, 32, causal=True, padded=True, rate=0.2, gated=True)
    yield Case("sink", 37, 37, 32, scores=True)


def quantizers(case: Case) -> dict[str, tuple[float, int]]:
    """Scale and zero point of scores and of probabilities, whose ranges clamp a few."""
    ranges = {"scores": (0.037, 121), "probs": (0.7 / 255, 0)}
    return {name: ends for name, ends in ranges.items() if getattr(case, name)}


def call(case: Case, x: dict[str, Tensor], rows: np.ndarray | None) -> Tensor:
    """The kernels' (B, Tq, H K) of q, k, v, and the sink and gate where there are; rows (B, Tk)."""
    device = x["q"].device
    step, first = (torch.tensor(n, device=device) if case.stored else n for n in (3, case.first))
    coded = {
        name: (torch.tensor(scale, device=device), torch.tensor(zero, device=device), 0, 255)
        for name, (scale, zero) in quantizers(case).items()
    }
    y = attention.attend(
        *(x[name] for name in "qkv"),
        None if rows is None else torch.from_numpy(rows).to(device),
        case.causal,
        case.spec,
        x.get("sink"),
        attention.Words(7, step, random.number_site(SITE), case.rate, first) if case.rate else None,
        x.get("gate"),
        coded.get("scores"),
        coded.get("probs"),
    )
    return y.transpose(1, 2).flatten(2)
