"""Attention scores: a compiled graph takes another product, of the same bits."""

from unittest import mock

import pytest
import torch

from qtx_torch import ops


@pytest.mark.parametrize("width", [4, 16, 32, 64])
def test_compiled_scores_have_the_bits_of_eager_ones(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 33, width, generator=generator) for _ in range(2))
    eager = ops.scores(q, k, width**-0.5)
    with (
        mock.patch.object(torch.compiler, "is_dynamo_compiling", return_value=True),
        mock.patch.object(torch, "baddbmm", side_effect=torch.baddbmm) as product,
    ):
        compiled = ops.scores(q, k, width**-0.5)
    assert torch.equal(eager, compiled)
    assert product.called == (width == 32)  # 32^-0.5 is no power of two
