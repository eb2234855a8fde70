"""Products of chosen pairs, against float64."""

import pytest
import torch

from .kernel_cases import DTYPES, PAIRS, draw, draw_pairs


pairs_triton = pytest.importorskip("hf_transcoders.ops.triton.pairs_triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 37, 300])
@pytest.mark.parametrize("kind", PAIRS)
def test_products_of_pairs(kind, width, dtype):
    offsets, indices = draw_pairs(kind, 9, 20)
    rows, table = draw(9, width, dtype=dtype), draw(20, width, seed=1, dtype=dtype)
    dots = pairs_triton.TritonPairSums.paired_dots(offsets, indices, rows, table)
    numbers = torch.repeat_interleave(torch.arange(9, device=rows.device), offsets.diff())
    expected = (rows.double()[numbers] * table.double()[indices]).sum(-1)
    assert dots.dtype == torch.float32
    torch.testing.assert_close(dots.double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_and_tables_that_are_not_contiguous():
    offsets, indices = draw_pairs("equal", 9, 20)
    rows, table = draw(16, 9), draw(20, 32, seed=1)
    dots = pairs_triton.TritonPairSums.paired_dots(offsets, indices, rows.T, table[:, ::2])
    expected = pairs_triton.TritonPairSums.paired_dots(
        offsets, indices, rows.T.contiguous(), table[:, ::2].contiguous()
    )
    assert torch.equal(dots, expected)
