"""What qtx asks of a backend, its models and trainers, and of data; both backends and every kind of data give it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from qtx_ref.spec import (
    Gradients,
    InputTransform,
    ModelSpec,
    OptimSpec,
    Output,
    Profile,
    Quant,
    QuantSpec,
    Range,
    StepSpec,
)

Arrays = dict[str, np.ndarray]
Batch = Mapping[str, np.ndarray]
Batches = Callable[[int], Iterable[Batch]]  # the first n batches, anew each time
Show = Callable[[str, np.ndarray], None]  # site and its codes


class Runnable(Protocol):
    """What scores a batch: a model in float, under fake quantization or, by a wrapper, in integers."""

    def evaluate(self, batch: Batch) -> tuple[float, int, int]:
        """Summed negative log-likelihood in nats, number of targets, number predicted right."""


class Model(Runnable, Protocol):
    """A model with its parameters, in float or, after `bind`, under fake quantization."""

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""

    def params(self) -> Arrays:
        """Parameters by name, copied."""

    def ranges(self) -> dict[str, Range]:
        """The static ranges in force, learned ones as they now stand."""

    def bind(
        self,
        quants: Mapping[str, Quant],
        ranges: Mapping[str, Range],
        *,
        masked_scores: bool = False,
        transforms: Mapping[str, InputTransform] | None = None,
        gradients: Gradients | None = None,
        profile: Profile = ...,
    ) -> None:
        """From now on quantize-dequantize the sites of `quants`; none: plain float. `gradients`: what backward passes
        quantize. `profile`: the rules of quantizing. Raises SpecError."""

    def forward(self, batch: Batch) -> np.ndarray:
        """The output: logits, or hidden states without a head."""

    def record(
        self, batch: Batch, sites: Iterable[str] | None = None
    ) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        """Each named tensor of a float forward pass with the mask of elements that count (None: all)."""

    def simulate(self, batch: Batch) -> Arrays:
        """What the quantizer of each site makes of its tensor in a forward pass as `bind` says."""

    def statistics(self, batch: Batch, units: Mapping[str, str], names: tuple[str, ...] = ...) -> dict[str, Arrays]:
        """Statistics of each site of `units` (site -> "sequence" or "token") in a float forward pass."""

    def input_moments(self, batch: Batch, sites: Iterable[str], names: tuple[str, ...] = ...) -> dict[str, Arrays]:
        """Moments of the input of each linear, (..., I), over real tokens in a float forward pass."""

    def attention(self, batch: Batch, marks: Mapping[str, np.ndarray], streams: Sequence[str]) -> list[Arrays]:
        """Sums of each layer by head, (H,); marks: keys (B, T) by name; streams: what each layer's output is added
        to."""

    def calibrate(
        self,
        batches: Iterable[Batch],
        quants: Mapping[str, Quant],
        *,
        quantize: bool = False,
        masked_scores: bool = False,
        transforms: Mapping[str, InputTransform] | None = None,
    ) -> dict[str, Range]:
        """Static ranges of `quants`. Raises ValueError naming a site without finite values."""

    def generate(self, tokens: np.ndarray, count: int, choose: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """`count` further tokens after tokens (B, T), each chosen from logits (B, V) -> (B,). Raises SpecError."""


class IntegerModel(Protocol):
    """A lowered model: codes in, codes or accumulators out."""

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""

    def run(self, batch: Batch, record: Show | None = None) -> Output:
        """The output. `record(name, value)` is shown every site's codes, and `<site>.accumulator`s."""

    def generate(self, tokens: np.ndarray, count: int, choose: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """As `Model.generate`."""


class Trainer(Protocol):
    """AdamW on a model; `state` and `load_state` are what makes a resumed run the uninterrupted one."""

    def step(self, batch: Batch, *, first: int = 0, total: int | None = None) -> tuple[float, float]:
        """One update; the loss before it and the gradient norm before clipping, of the global batch, the same in every
        process.

        batch: rows `first` on of a global batch of `total` rows (None: all of it). Raises SpecError where it has not
        as many equal parts as the step's `accumulate` says.
        """

    def state(self) -> Arrays:
        """All that a resumed run needs beside the parameters."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `state` gave."""

    @property
    def shared(self) -> bool:
        """Whether each process has a share of the parameters and of the optimizer's averages, and `state` and the
        model's `params` are gathered."""

    def is_finite(self) -> bool:
        """Whether all numbers are that this process has of parameters and state."""

    def save_shares(self, folder: str) -> Arrays:
        """Writes each process's shares into a folder; returns what else `state` has. Raises OSError."""

    def load_shares(self, folder: str, rest: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `save_shares` wrote and gave, whatever number of processes did. Raises OSError."""


class MakeModel(Protocol):
    """A backend's `Model`. Raises SpecError for a device or dtype that is not to be had."""

    def __call__(
        self, spec: ModelSpec, params: Mapping[str, np.ndarray], *, device: str = "cpu", dtype: str = "float32"
    ) -> Model: ...


class MakeIntegerModel(Protocol):
    """A backend's `IntegerModel`, of the constants that lowering made. Raises SpecError for what integers refuse."""

    def __call__(
        self,
        spec: ModelSpec,
        constants: Mapping[str, np.ndarray],
        quants: Mapping[str, QuantSpec],
        profile: Profile,
        *,
        device: str = "cpu",
        strict: bool = False,
    ) -> IntegerModel: ...


class MakeTrainer(Protocol):
    """A backend's `Trainer`. Raises SpecError where the optimizer's `only` names no parameter, or where the backend has
    no such step."""

    def __call__(self, model: Model, optim: OptimSpec, *, seed: int = 0, step: StepSpec = ...) -> Trainer: ...


class Backend(Protocol):
    """The module of a backend."""

    Model: MakeModel
    IntegerModel: MakeIntegerModel
    Trainer: MakeTrainer

    def choose_device(self, name: str) -> str:
        """The device that `auto` stands for on this machine; any other name as it is."""

    def check_machine(self, device: str, dtype: str) -> None:
        """Raises SpecError for a device or dtype that is not to be had."""

    def check_step(self, step: StepSpec, device: str) -> None:
        """Raises SpecError for a way to compute a training step that is not to be had on a device."""

    def threads(self) -> int:
        """How many threads its sums are divided among: the last bits depend on it."""

    def processes(self) -> tuple[int, int]:
        """This process's number, from 0, and how many train one model."""

    def join(self, device: str) -> AbstractContextManager[None]:
        """Within it the processes that train one model know each other. Raises ConnectionError where one is lost."""

    def agree(self, values: Sequence[float]) -> list[float]:
        """The largest of all processes' values, place by place, in all of them: each has to ask."""

    def peak_memory(self, device: str) -> int | None:
        """Bytes taken at most on a device that has memory of its own; None where it has not."""


class Calibration(Protocol):
    """Data that ranges come from."""

    def split_batches(
        self, split: str, spec: ModelSpec, batch_size: int, seed: int, limit: int | None = None
    ) -> Iterable[Batch]:
        """The split once, in order, at most `limit` batches; the last may be smaller."""

    def hashes(self, split: str) -> list[str]:
        """The sha256 of each item of the split (or its first 16 digits), in order."""


class Data(Calibration, Protocol):
    """Text or images in the splits train, calibration and evaluation, none in two.

    A batch is NumPy arrays by name: tokens (B, T) int64, mask (B, T) bool, types and targets of text; images (B, C, S,
    S) float32; labels (B,) int64 of a classifier's, and soft_labels (B, classes) where a training batch weighs several
    classes. What takes a model's spec raises DataError where the model does not
    fit.
    """

    source: str

    def fingerprint(self, split: str) -> str:
        """One sha256 for the whole split."""

    def describe(self) -> dict[str, object]:
        """What a checkpoint keeps of its data, as JSON values."""

    def train_batches(
        self, spec: ModelSpec, batch_size: int, seed: int, start: int = 0, rows: slice | None = None
    ) -> Iterator[Batch]:
        """Batches of the train split without end, from step `start` on, of which `rows` are made (None: all); what a
        batch holds depends on (seed, step) alone."""
