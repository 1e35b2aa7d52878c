"""The groups of benchmarks: one question each, answered by one function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .harness import Row, Skip

Rows = Callable[[str, bool], Iterable[Row | Skip]]


@dataclass(frozen=True)
class Group:
    """`place` is module:function in this folder; `threads` those of its process; `devices` where it has an answer."""

    name: str
    question: str
    place: str
    threads: int = 1
    devices: tuple[str, ...] = ("cpu",)

    def find(self) -> Rows:
        """The function that yields its rows, given the device and whether it should be quick."""
        module, _, function = self.place.partition(":")
        return getattr(importlib.import_module(f"benchmarks.{module}"), function)


GROUPS = (
    Group("training", "A training step against transformers, and of each attention", "training:rows"),
    Group("plain", "A training step of small models against plain torch", "training:plain_rows"),
    Group("fake_quant", "A fake-quantized training step against the float step", "fake_quant:rows"),
    Group("engines", "A forward pass by other engines", "engines:rows"),
    Group("quantizers", "Fake quantization of rows by other libraries", "quantizers:rows"),
    Group("integer_model", "A forward pass in integers, compiled", "integer_model:rows"),
    Group("rows", "Fake quantization of rows against a copy", "row_quantizers:rows", devices=("cpu", "cuda")),
    Group("int8", "A linear trained by int8 products", "int8_linear:rows", devices=("cpu", "cuda")),
    Group("size", "A forward pass of one layer, width 384 and 1 x 128 where not said", "size:rows"),
    Group(
        "fused", "Attention by torch's kernels and FlexAttention, 12 heads of 64", "fused:rows", devices=("cpu", "cuda")
    ),
    Group("data", "Tokenizing into shards beside the tokenizers library", "data:rows", threads=2),
    Group("gpu", "Training steps in bfloat16, 32 x 128", "gpu:rows", devices=("cuda",)),
    Group("attention", "Clipped attention in tiles, 12 heads of 64", "attention:rows"),
    Group("attention_gpu", "Clipped attention's kernels, 16384 tokens", "attention_gpu:rows", devices=("cuda",)),
    Group("statistics", "Statistics and calibration against a float forward pass", "analyze:rows", threads=2),
    Group("reference", "A forward pass of the NumPy reference against torch", "analyze:reference_rows"),
    Group(
        "integer_matmul",
        "Products of integer codes, compiled, against floats",
        "integer_matmul:rows",
        devices=("cpu", "cuda"),
    ),
    Group("probe", "Ways to multiply bytes exactly here", "integer_matmul:probe_rows", devices=("cpu", "cuda")),
    Group("gates", "A forward pass with each attention", "training:gate_rows"),
)
