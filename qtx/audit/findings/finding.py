"""What a finding is."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """A difference that somebody will meet."""

    id: str  # "QTX-REQ-001": stable
    title: str
    cause: str
    consequence: str
    reproduce: str  # a few lines of Python that run, and print
    remedy: str
