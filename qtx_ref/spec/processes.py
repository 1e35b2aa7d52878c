"""Which of several processes this is, as `torchrun` tells each that it starts."""

from __future__ import annotations

import os

from .base import refuse

__all__ = ["read_processes"]


def read_processes() -> tuple[int, int]:
    """This process's number, from 0, and how many there are: the environment's RANK and WORLD_SIZE; (0, 1) without
    them. Raises SpecError where they are no such numbers."""
    rank, count = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdigit() and count.isdigit() and int(rank) < int(count)):
        refuse("RANK of WORLD_SIZE", f"{rank} of {count}", "torchrun sets both; unset them for one process")
    return int(rank), int(count)
