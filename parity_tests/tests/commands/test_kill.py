"""A slice of `python -m parity_tests.kill_test`."""

from parity_tests.kill_test import stop_runs


def test_killed_training_is_resumed_to_the_bit(tmp_path):
    stopped = stop_runs(tmp_path, 1, seed=1, steps=10)
    assert len(stopped) == 2 and not [moment for moment in stopped if moment.fault]
