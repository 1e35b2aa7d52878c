"""torch against the reference: one test per case of the table, and the same table on CUDA where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from parity_tests.mirror.fakequant import measure_flips, resolve_recipe
from parity_tests.proof.case import Case, Context
from parity_tests.runner import check_checkpoint, report_rows, run, run_case
from parity_tests.subjects import small_models
from parity_tests.table import list_cases
from qtx_ref.backend import Model as RefModel
from qtx_torch.backend import Model

CONTEXT = Context()


@pytest.mark.parametrize("case", list_cases("torch"), ids=lambda case: case.id)
def test_torch(case: Case) -> None:
    row = run_case(case, CONTEXT)
    assert row.ok, row.failure or row.worst


@pytest.mark.parametrize("case", list_cases("torch", "bfloat16"), ids=lambda case: case.id)
def test_torch_in_bfloat16(case: Case) -> None:
    row = run_case(case, Context(dtype="bfloat16"))
    assert row.ok, row.failure or row.worst


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_on_cuda(dtype: str) -> None:
    report = run(device="cuda", dtype=dtype)
    assert report.ok, [line for line in report_rows(report) if line[1] != "ok"]


@pytest.mark.parametrize(
    ("name", "recipe"), [("bert_gate_mlp", "w8a8"), ("opt_gate_linear", None), ("vit_headless", "train-w8a8")]
)
def test_users_checkpoint(name: str, recipe: str | None) -> None:
    small = small_models.build(name)
    quants = resolve_recipe(recipe, small.spec)[1] if recipe else None
    report = check_checkpoint(small.spec, small.params, [small.batch], quants)
    assert report.ok, report_rows(report)
    assert report.first == "" and len(report.rows) == (4 if recipe else 2)


def test_flips_of_dynamic_ranges_are_of_codes() -> None:
    """Float noise moves a dynamic scale and with it each value; few codes flip. A planted fault flips many."""
    small = small_models.build("opt_plain")
    quants = resolve_recipe("train-w8a8", small.spec)[1]
    moved = {name: value + np.float32(0.1) * np.sign(value) for name, value in small.params.items()}
    rates = []
    for params in (small.params, moved):
        ref, other = RefModel(small.spec, small.params), Model(small.spec, params)
        for model in (ref, other):
            model.bind(quants, {})
        rates.append([v.error for v in measure_flips(ref, other, small.batch, False) if v.measure == "flip rate"])
    assert max(rates[0]) < 0.05 < 0.5 < max(rates[1])
