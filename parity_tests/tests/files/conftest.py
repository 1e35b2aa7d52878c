"""A checkpoint and its artifact, made once for all files of this folder; no test changes them."""

import pytest

from parity_tests.tests.shell import REF, TRAIN, good


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A vit whose clipped, gated attention uses most of what an integer model can do."""
    out = tmp_path_factory.mktemp("checkpoint")
    good(*TRAIN, "--out", out, "--attention", "clipped+gated")
    return out / "model.safetensors"


@pytest.fixture(scope="session")
def artifact(checkpoint):
    file = checkpoint.with_name("model.qtx")
    good("quantize", checkpoint, *REF, "--out", file)
    return file
