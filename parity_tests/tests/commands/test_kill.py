"""A slice of `python -m parity_tests.long.kill_test`, and faults that it must see."""

import copy

import numpy as np
import pytest

from parity_tests.long.kill_test import Left, compare, stop_runs

WHOLE = Left(
    {"model.safetensors": {"a": np.arange(3.0)}, "model-000004.safetensors": {"a": np.arange(2.0)}},
    [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}],
)


def test_killed_training_is_resumed_to_the_bit(tmp_path):
    stopped = list(stop_runs(tmp_path, 1, seed=1, steps=10))
    assert len(stopped) == 2 and not [moment for moment in stopped if moment.fault]


@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        (lambda left: left.log.insert(1, left.log[1]), "steps of the log are [1, 2, 2]"),
        (lambda left: left.log.pop(), "steps of the log are [1]"),
        (lambda left: left.log[1].update(loss=np.nextafter(0.2, 1)), "lines of the log differ: of step 2"),
        (lambda left: left.tensors.pop("model-000004.safetensors"), "checkpoints differ"),
        (lambda left: left.tensors["model-000004.safetensors"].update(a=np.array([0.0, -1.0])), "bits of model-000004"),
        (lambda left: left.tensors["model.safetensors"].update(b=np.ones(1)), "tensors of model.safetensors differ"),
    ],
)
def test_a_fault_is_seen(plant, fault):
    left = copy.deepcopy(WHOLE)
    assert compare(left, WHOLE) is None
    plant(left)
    assert fault in compare(left, WHOLE)
