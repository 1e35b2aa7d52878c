"""From a black box to its fingerprint."""

from __future__ import annotations

from collections.abc import Sequence

from .boxes import CODES, Observed, observe
from .linear import Linear
from .quantizers import Dequantize, FakeQuantize, Quantize
from .questions import Box, Function, Operation
from .search import Advance, Fingerprint, Search


def find_rules(
    function: Function,
    op: str,
    codes: Sequence[str] | None = None,
    seed: int = 0,
    advance: Advance = lambda kind: None,
) -> tuple[Fingerprint, Observed]:
    """The rules of a box that takes arrays by name, and what was seen of it before. `codes`: dtypes of codes that it
    may take; None: those that are usual. Raises SpecError for a box that takes none, or does not answer in numbers."""
    box = Box(function)
    observed = observe(box, op, codes or CODES[op])
    if observed.unexplained is not None:
        calls = box.calls
        return Fingerprint(op, (), (), (), calls, calls, box.inputs, 0, (), (), observed.unexplained), observed
    return Search(make_operation(op, observed), box, seed, advance).run(), observed


def make_operation(op: str, observed: Observed) -> Operation:
    """The operation that a search asks for, with the codes that were seen."""
    if op == "quantize":
        return Quantize(observed.specs, observed.stochastic)
    if op == "dequantize":
        return Dequantize(tuple(observed.specs))
    return FakeQuantize(observed.specs) if op == "fake_quantize" else Linear(observed.specs)
