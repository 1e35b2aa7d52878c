"""What a case of the parity table is, and what it is run with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from parity_tests.proof.verdict import Verdict


@dataclass
class Context:
    """Where and in which dtype the backend under test computes. `shared` keeps what several cases use."""

    device: str = "cpu"
    dtype: str = "float32"
    shared: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of `make()`, computed for the first asker only."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


@dataclass(frozen=True)
class Case:
    """A row of the table. `backend` names what is held to account: ref to outside truth, torch to the reference."""

    group: str
    name: str
    backend: str
    run: Callable[[Context], list[Verdict]]
    dtypes: tuple[str, ...] = ("float32",)

    @property
    def id(self) -> str:
        return f"{self.group}/{self.name}"
