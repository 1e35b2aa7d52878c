"""The reference against outside truth: one test per case of the table."""

from __future__ import annotations

import pytest

from parity_tests.proof.case import Case, Context
from parity_tests.runner import run_case
from parity_tests.table import list_cases

CONTEXT = Context()


@pytest.mark.parametrize("case", list_cases("ref"), ids=lambda case: case.id)
def test_reference(case: Case) -> None:
    row = run_case(case, CONTEXT)
    assert row.ok, row.failure or row.worst
