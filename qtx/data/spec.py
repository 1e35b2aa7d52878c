"""What a run's data are, as its file says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from qtx_ref.spec import Name, Spec, from_dict, to_dict
from qtx_ref.spec.base import refuse

OWN_PLACE = ("sources", "tokenizer", "vocab")  # fields that a checkpoint keeps otherwise


class Order(Name):
    """In what order windows come."""

    WINDOWS = "windows"  # each step draws random windows; any start is as likely as another
    PERMUTATION = "permutation"  # adjoining windows, each once per epoch, in an order of its own per epoch


class Packing(Name):
    """Where a window may reach."""

    SECTION = "section"  # it ends where its section or document does
    STREAM = "stream"  # documents are joined, and windows cut from the whole


class Begin(Name):
    """In front of what the beginning token stands: [CLS] of a BERT, which ends with [SEP] too; else what the tokenizer
    puts before a text (</s> of OPT) or, where it puts nothing, its [BOS], <s>, </s> or [CLS]."""

    NONE = "none"
    WINDOW = "window"
    DOCUMENT = "document"


@dataclass(frozen=True)
class Source(Spec):
    """One source of a mixture."""

    path: str  # books, digits, backcopy, unigram, a file, a folder, or hub:NAME of the library datasets
    weight: float = 1.0  # its share of the windows, beside the others'

    def check(self) -> None:
        if not self.path:
            refuse("data source", self.path, "give books, digits, backcopy, unigram, a file, a folder or hub:NAME")
        if not self.weight > 0:
            refuse(f"weight of {self.path}", self.weight, "give a number above 0")


@dataclass(frozen=True)
class Augmentation(Spec):
    """What is done to the images of a training batch, anew at each step. Evaluation and calibration see none of it."""

    crop: float | None = None  # least share of the area that a random crop keeps, made the model's size; None: no crop
    flip: float = 0.0  # probability that left and right are exchanged
    brightness: float = 0.0  # x: all pixels times a factor drawn from 1 - x to 1 + x
    contrast: float = 0.0  # x: their distance from the image's mean grey times such a factor
    saturation: float = 0.0  # x: their distance from their own grey times such a factor
    mixup: float = 0.0  # alpha of the Beta(alpha, alpha) that two images are mixed by; 0: none is
    smoothing: float = 0.0  # share of a label's weight that goes to all classes alike

    def check(self) -> None:
        if self.crop is not None and not 0 < self.crop <= 1:
            refuse("augment crop", self.crop, "give a share of the area above 0, at most 1")
        for name in ("flip", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                refuse(f"augment {name}", getattr(self, name), "give a number from 0 to 1")
        if not 0 <= self.smoothing < 1:
            refuse("augment smoothing", self.smoothing, "give a number from 0 to below 1")
        if not self.mixup >= 0:
            refuse("augment mixup", self.mixup, "give a number, 0 or above")

    @property
    def soft(self) -> bool:
        """Whether a label becomes weights of several classes."""
        return self.mixup > 0 or self.smoothing > 0


@dataclass(frozen=True)
class DataSpec(Spec):
    """All that decides which batches a run sees."""

    sources: tuple[Source, ...] = ()  # none: the model's own; several: a mixture
    tokenizer: str | None = None  # a tokenizer.json
    vocab: int | None = None  # of a tokenizer trained here
    window: int | None = None  # tokens of a training text, by which alpha divides; None: the model's length
    order: Order = Order.WINDOWS
    packing: Packing = Packing.SECTION
    begin: Begin | None = None  # None: of each window for a BERT, nowhere for an OPT
    mask_rate: float = 0.15  # share of the tokens that a masked language model predicts
    held_out: float = 0.1  # share of the documents that evaluates, and as much again that calibrates
    augment: Augmentation = Augmentation()

    def check(self) -> None:
        for name in ("window", "vocab"):
            value = getattr(self, name)
            if value is not None and value < 1:
                refuse(f"data {name}", value, "give at least 1")
        if not 0 < self.mask_rate <= 1:
            refuse("data mask_rate", self.mask_rate, "give a share above 0, at most 1")
        if not 0 < self.held_out < 0.5:
            refuse("data held_out", self.held_out, "give a share above 0, below 0.5")
        paths = [source.path for source in self.sources]
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            refuse("data source", twice[0], "it stands there twice; give it once, with a weight")

    def describe(self) -> dict[str, Any]:
        """What a checkpoint keeps of it beside what the data say themselves: settings that are not the defaults, and
        the sources of a mixture, as JSON values. Places (`sources`) stand apart from what decides the batches."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        about: dict[str, Any] = {}
        if kept := {name: to_dict(value) for name, value in own.items() if name not in OWN_PLACE}:
            about["settings"] = kept
        if len(self.sources) > 1:
            about["sources"] = [source.path for source in self.sources]
            about["weights"] = [source.weight for source in self.sources]
        return about

    @classmethod
    def of(cls, about: Mapping[str, Any], source: str | None = None) -> DataSpec:
        """The settings of a checkpoint's `meta["data"]`; on another source if one is given. Raises SpecError."""
        spec = from_dict(cls, about.get("settings", {}), "meta.data.settings")
        if source is None and "sources" in about:
            paths, weights = about["sources"], about.get("weights")
            if not isinstance(paths, list) or not isinstance(weights, list) or len(paths) != len(weights):
                refuse("meta.data.sources", paths, "sources and weights must be lists of one length")
            return replace(spec, sources=tuple(map(Source, paths, weights)))
        name = about.get("source") if source is None else source
        return replace(spec, sources=() if name is None else (Source(name),))
