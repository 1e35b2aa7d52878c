"""What training asks of a backend's model and trainer, and of data; both backends and every kind of data give it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from qtx_ref.spec import InputTransform, ModelSpec, Quant, Range

Arrays = dict[str, np.ndarray]
Batch = Mapping[str, np.ndarray]


class Model(Protocol):
    """A model with its parameters, in float or, after `bind`, under fake quantization."""

    spec: ModelSpec

    def params(self) -> Arrays: ...

    def ranges(self) -> dict[str, Range]: ...

    def bind(
        self,
        quants: Mapping[str, Quant],
        ranges: Mapping[str, Range],
        *,
        masked_scores: bool = False,
        transforms: Mapping[str, InputTransform] | None = None,
    ) -> None: ...

    def evaluate(self, batch: Batch) -> tuple[float, int, int]: ...

    def statistics(self, batch: Batch, units: Mapping[str, str], names: tuple[str, ...]) -> dict[str, Arrays]: ...


class Trainer(Protocol):
    """AdamW on a model; `state` and `load_state` are what makes a resumed run the uninterrupted one."""

    def step(self, batch: Batch) -> tuple[float, float]: ...

    def state(self) -> Arrays: ...

    def load_state(self, state: Mapping[str, np.ndarray]) -> None: ...


class Data(Protocol):
    """Text or images in the splits train, calibration and evaluation, which never overlap."""

    # of text
    vocab: int
    tokenizer_json: str

    def describe(self) -> dict[str, Any]: ...

    def hashes(self, split: str) -> list[str]: ...

    def train_batches(self, spec: ModelSpec, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]: ...

    def split_batches(
        self, split: str, spec: ModelSpec, batch_size: int, seed: int, limit: int | None = None
    ) -> Iterable[Batch]: ...
