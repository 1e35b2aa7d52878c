"""Attention's kernels, under Triton's interpreter where there is no GPU: each variant, planted faults, under
the compiler, in models.

All combinations: python -m parity_tests.long.attention_kernels
"""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def run(*command: str, interpret: bool = True) -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    import torch

    wanted = {"TRITON_INTERPRET": "1"} if interpret and not torch.cuda.is_available() else {}
    done = subprocess.run([sys.executable, *command], env=os.environ | wanted, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_variant_equals_the_reference_and_faults_are_found() -> None:
    run("-m", "parity_tests.long.attention_kernels", "--few")


def test_kernels_compile_for_a_gpu() -> None:
    """Triton interprets more than it compiles."""
    run("-m", "parity_tests.long.attention_kernels", "--few", "--arch", "90", interpret=False)
