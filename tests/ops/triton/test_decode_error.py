"""The decoder fused with its error, against float64."""

import pytest
import torch

from .kernel_cases import DTYPES, PAIRS, TOLERANCE, dense_of, draw, draw_pairs


decode_error = pytest.importorskip("hf_transcoders.ops.triton.decode_error")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", ["bias", "rows"])
@pytest.mark.parametrize("kind, width", [*((kind, 37) for kind in PAIRS), ("equal", 300)])
def test_reconstruction_residual_and_squared_error(kind, width, start, dtype):
    offsets, indices = draw_pairs(kind, 9, 20)
    values, table = draw(len(indices), dtype=dtype), draw(20, width, seed=1, dtype=dtype)
    added = draw(width, seed=2) if start == "bias" else draw(9, width, seed=2)
    targets = draw(9, width, seed=3)
    out, residual, squared = decode_error.decode_error(offsets, indices, values, table, added, targets)
    expected = dense_of(offsets, indices, values, 20) @ table.double() + added.double()
    assert out.dtype == residual.dtype == dtype and squared.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
    # The error is that of the reconstruction that is returned, rounded as it is.
    exact = out.double() - targets.double()
    torch.testing.assert_close(residual.double(), exact, **TOLERANCE[dtype])
    torch.testing.assert_close(squared.double(), exact.square().sum(1), rtol=1e-5, atol=1e-5)
