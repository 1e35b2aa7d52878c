"""The optimizer of the published commands, against torch's and transformers' own."""

import numpy as np
import pytest
import torch

from qtx_ref import optim as ref_optim
from qtx_ref.spec import OptimSpec, Schedule
from qtx_torch import optim as torch_optim

transformers = pytest.importorskip("transformers", reason="its schedules are the expected values")
BACKENDS = {"ref": ref_optim, "torch": torch_optim}
SCHEDULES = {
    Schedule.LINEAR: "linear",
    Schedule.COSINE: "cosine",
    Schedule.CONSTANT: "constant_with_warmup",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("lr", "warmup", "steps"), [(4e-4, 7, 41), (1e-4, 0, 13), (1e-3, 10, 10)])
def test_rates_are_those_of_transformers_to_the_bit(backend, schedule, lr, warmup, steps):
    """`get_scheduler` over torch's optimizer, and one step beyond the last."""
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = transformers.get_scheduler(SCHEDULES[schedule], inner, warmup, steps)
    spec = OptimSpec(lr=lr, warmup=warmup, steps=steps, schedule=schedule, first_rate_zero=True)
    for step in range(steps + 1):
        assert BACKENDS[backend].learning_rate(spec, step) == scheduler.get_last_lr()[0], step
        inner.step()
        scheduler.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_rate_is_zero_only_where_asked(backend):
    rates = [
        BACKENDS[backend].learning_rate(OptimSpec(lr=1.0, warmup=4, steps=8, first_rate_zero=z), 0)
        for z in (True, False)
    ]
    assert rates == [0.0, 0.25]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limit", [0.5, 1.0, 5.0, 5.0000005, 5.0001])
def test_clipping_is_that_of_torch(backend, limit):
    """The norm is 5; just above it torch still multiplies, by a factor a little below 1."""
    values = {"a": np.float32([3]), "b": np.float32([4])}
    theirs = [torch.nn.Parameter(torch.zeros(1)) for _ in values]
    for parameter, value in zip(theirs, values.values(), strict=True):
        parameter.grad = torch.from_numpy(value.copy())
    norm = torch.nn.utils.clip_grad_norm_(theirs, limit)
    given = values if backend == "ref" else {name: torch.from_numpy(value.copy()) for name, value in values.items()}
    got, got_norm = BACKENDS[backend].clip_by_norm(given, limit)
    assert got_norm == float(norm) == 5.0
    for parameter, value in zip(theirs, got.values(), strict=True):
        # torch rounds the sum norm + 1e-6 and the factor to float32 (6e-8 each), we the factor alone
        np.testing.assert_allclose(np.asarray(value), parameter.grad.numpy(), rtol=2.5e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_steps_are_those_of_the_published_loop(backend):
    """Clip, AdamW with torch's own eps, transformers' schedule from rate 0; two groups, one without decay."""
    draw = np.random.default_rng(0)
    first = {"ffn.output.weight": draw.normal(size=(5, 7)), "ffn.output.bias": draw.normal(size=7)}
    first = {name: value.astype(np.float32) for name, value in first.items()}
    theirs = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in first.items()}
    groups = [{"params": [theirs["ffn.output.weight"]], "weight_decay": 0.1}]
    groups += [{"params": [theirs["ffn.output.bias"]], "weight_decay": 0.0}]
    inner = torch.optim.AdamW(groups, lr=4e-4, betas=(0.9, 0.95))
    scheduler = transformers.get_scheduler("linear", inner, 5, 30)
    spec = OptimSpec(lr=4e-4, beta2=0.95, weight_decay=0.1, warmup=5, steps=30, first_rate_zero=True)
    own = {name: value.copy() for name, value in first.items()}
    if backend == "torch":
        own = {name: torch.from_numpy(value).requires_grad_() for name, value in own.items()}
    optimizer = BACKENDS[backend].AdamW(own, spec)
    for step in range(20):
        grads = {name: draw.normal(size=value.shape).astype(np.float32) for name, value in first.items()}
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(grads[name].copy())
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        inner.step()
        scheduler.step()
        optimizer.step({name: torch.from_numpy(g) for name, g in grads.items()} if backend == "torch" else grads)
        if step == 0:  # its rate is 0: nothing moves
            for name, value in first.items():
                np.testing.assert_array_equal(theirs[name].detach().numpy(), value)
    for name, parameter in theirs.items():
        got = own[name].detach().numpy() if backend == "torch" else own[name]
        # each of 20 updates of at most 4e-4 rounds beside values of about 1: 20 * 6e-8, and as much for torch's own
        np.testing.assert_allclose(got, parameter.detach().numpy(), rtol=0, atol=2.5e-6)
        assert np.abs(got - first[name]).max() > 1e-3  # they did move
