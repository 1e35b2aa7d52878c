"""From a black box to its fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from qtx_ref.spec import QuantSpec

from .boxes import CODES, FLOATS, Observed, observe
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
    box = Box(function, floats=op in FLOATS)
    observed = observe(box, op, codes or CODES[op])
    if observed.unexplained is not None:
        calls = box.calls
        return Fingerprint(op, (), (), (), calls, calls, box.inputs, 0, (), (), observed.unexplained), observed
    operation = make_operation(op, tuple(observed.specs.items()), observed.stochastic)
    return Search(operation, box, seed, advance).run(), observed


@lru_cache(maxsize=8)
def make_operation(op: str, specs: tuple[tuple[str, QuantSpec], ...], stochastic: bool) -> Operation:
    """The operation that a search asks for, with the codes that were seen. It is kept: what rules say to its questions
    serves the next box."""
    if op == "quantize":
        return Quantize(dict(specs), stochastic)
    if op == "dequantize":
        return Dequantize(tuple(dict(specs)))
    return FakeQuantize(dict(specs)) if op == "fake_quantize" else Linear(dict(specs))
