"""Attention's kernels, under Triton's interpreter where there is no GPU: each variant, planted faults, the compiler.

All combinations: python -m parity_tests.long.attention_kernels
"""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

FAULTS = """
from dataclasses import replace
from unittest import mock
import torch
from parity_tests.long import attention_kernels as cases
from qtx_torch.kernels import attention

device = "cuda" if torch.cuda.is_available() else "cpu"
clipped = cases.Case("clipped", 20, 36, 32, causal=True, padded=True)
run = attention.run_forward

def keep_result(*given):  # D from O, as without a clip
    out, context, passed, *rest = run(*given)
    return out, context, out, *rest

def shift_words(*given):
    *before, words, train = given
    return run(*before, [*words[:-1], words[-1] + 4], train)

def lower_gamma(*given):
    *before, numbers, words, train = given
    return run(*before, [*numbers[:2], numbers[2] - 1e-5, *numbers[3:]], words, train)

def coarsen(*given):
    coder = given[6].clone()
    coder[2] *= 2
    return run(*given[:6], coder, *given[7:])

faults = {
    keep_result: clipped, shift_words: replace(clipped, rate=0.1), lower_gamma: clipped,
    coarsen: replace(clipped, causal=False, probs=True),
}
for fault, case in faults.items():
    for patched in (False, True):
        with mock.patch.object(attention, "run_forward", fault if patched else run):
            verdicts = list(cases.check(case, device))
        assert all(verdict.ok for verdict in verdicts) is not patched, fault.__name__
"""

COMPILED = """
import torch
from parity_tests.long import attention_kernels as cases
from qtx_torch import random

torch.compiler.assume_constant_result(random.number_site)
device = "cuda" if torch.cuda.is_available() else "cpu"
case = cases.Case("sink", 20, 36, 32, causal=True, padded=True, rate=0.2, first=20 * 36 * 4, stored=True, gated=True)
leaves, rows = cases.make_leaves(case)
x = {n: torch.tensor(v, dtype=torch.float32, device=device, requires_grad=True) for n, v in leaves.items()}
compiled = torch.compile(lambda x: cases.call(case, x, rows), backend="aot_eager", fullgraph=True)
results = []
for run in (lambda x: cases.call(case, x, rows), compiled):
    y = run(x)
    results.append([y, *torch.autograd.grad(y, list(x.values()), torch.ones_like(y))])
assert all(torch.equal(a, b) for a, b in zip(*results))
"""


def run(*command: str, interpret: bool = True) -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    import torch

    wanted = {"TRITON_INTERPRET": "1"} if interpret and not torch.cuda.is_available() else {}
    done = subprocess.run([sys.executable, *command], env=os.environ | wanted, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_variant_equals_the_reference() -> None:
    run("-m", "parity_tests.long.attention_kernels", "--few")


def test_planted_faults_are_found() -> None:
    run("-c", FAULTS)


def test_the_compiler_takes_both_operators_in_one_graph() -> None:
    run("-c", COMPILED)


def test_kernels_compile_for_a_gpu() -> None:
    """Triton interprets more than it compiles."""
    run("-m", "parity_tests.long.attention_kernels", "--few", "--arch", "90", interpret=False)
