"""What a run's data are, as its file says it."""

from __future__ import annotations

from dataclasses import dataclass

from qtx_ref.spec import Name, Spec


class Order(Name):
    """In what order windows come."""

    WINDOWS = "windows"  # each step draws random windows of sections; any start is as likely as another
    PERMUTATION = "permutation"  # adjoining windows, each once per epoch, in an order of its own per epoch


class Packing(Name):
    """Where a window may reach."""

    SECTION = "section"  # it ends where its section or document does
    STREAM = "stream"  # documents are joined, and windows cut from the whole


class Begin(Name):
    """In front of what the beginning token ([CLS] of BERT, </s> of OPT, ...) stands."""

    NONE = "none"
    WINDOW = "window"
    DOCUMENT = "document"


@dataclass(frozen=True)
class Source(Spec):
    """One source of a mixture."""

    path: str  # books, digits, a file, a folder, or hub:NAME of the library datasets
    weight: float = 1.0  # its share of the windows, beside the others'


@dataclass(frozen=True)
class DataSpec(Spec):
    """All that decides which batches a run sees."""

    sources: tuple[Source, ...] = ()  # none: the model's own
    tokenizer: str | None = None  # a tokenizer.json
    vocab: int | None = None  # of a tokenizer trained here
    window: int | None = None  # tokens of a training text, by which alpha divides; None: the model's length
    order: Order = Order.WINDOWS
    packing: Packing = Packing.SECTION
    begin: Begin = Begin.NONE
    mask_rate: float = 0.15  # share of the tokens that a masked language model predicts
