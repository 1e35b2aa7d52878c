"""The walk of one weight from `qtx quantize` to `qtx evaluate` is found, the same each time, and gets no longer."""

from __future__ import annotations

import numpy as np
import pytest

from parity_tests.long.walk import WEIGHT, Follower, follow

ROOMS, RETURNS = 14, 18


def test_the_walk_of_a_weight() -> None:
    walk = follow()
    assert list(walk.commands) == ["quantize", "evaluate"]
    rooms = {file.partition("/")[0] for file in walk.rooms}
    assert rooms == {"qtx", "qtx_ref"}  # the reference runs without torch
    assert len(walk.rooms) <= ROOMS and walk.returns <= RETURNS, walk
    passages = [passage for command in walk.commands.values() for passage in command]
    assert len(passages) == len(walk.rooms) + walk.returns
    other = follow(WEIGHT.replace("layer.0", "layer.1"))  # through the same rooms, after another layer
    assert set(other.rooms) == set(walk.rooms) and other.returns == walk.returns


def test_what_holds_a_weight() -> None:
    follower, weight = Follower(WEIGHT), np.arange(6.0).reshape(2, 3)
    assert follower.holds({WEIGHT: weight})  # the first of all: it is the weight
    assert all(follower.holds(value) for value in (weight, weight.T, weight[0], weight.copy(), {WEIGHT: weight + 0}))
    other = weight + 1
    assert not any(follower.holds(value) for value in (other, {WEIGHT: other}, {"other": weight}, [weight], None, 1.0))


def test_a_weight_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match="no function of qtx quantize holds head.x"):
        follow("head.x")
