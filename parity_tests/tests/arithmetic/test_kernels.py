"""Triton's kernels, under its interpreter where there is no GPU, against the reference."""

import importlib.util
import os
import subprocess
import sys

import pytest

PHILOX = """
import zlib
import numpy as np, torch
from qtx_ref import random
from qtx_torch.kernels.philox import write_words

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
place = zlib.crc32(b"layer.0.attn.probs")
cases = [(0, 0, 1, 0), (5, 1, 1023, 2), (2**63 + 11, 2**32 - 1, 5000, 7), (2**64 - 1, 70000, 300, 2**34 + 3)]
for seed, step, count, first in [*cases, (1, 1, 0, 0)]:
    want = random.bits(seed, step, "layer.0.attn.probs", count, first)
    got = write_words(seed, step, place, count, first, device, None)
    assert got.dtype == torch.int64 and np.array_equal(got.cpu().numpy(), want), (seed, step, count, first)
    keep = random.keep_mask(seed, step, "layer.0.attn.probs", (count,), 0.1, first)
    assert np.array_equal(write_words(seed, step, place, count, first, device, round(0.1 * 2**32)).cpu().numpy(), keep)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_philox_in_one_pass_has_the_words_of_the_reference() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    import torch

    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PHILOX], env=os.environ | interpret, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
