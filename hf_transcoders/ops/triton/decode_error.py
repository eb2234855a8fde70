"""The sparse decoder fused with the residual and its squared norm, which the loss is made of."""

import torch
import triton
import triton.language as tl

from .launching import COMPILER_OPTIONS, gathered_block, on_device_of, tiles_of
from .segment_sums import PAIRS_AT_A_TIME, sum_of_pairs


@triton.jit
def decode_error_kernel(
    offsets, indices, values, table, start, start_stride, targets, out, residual, squared, width,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Reconstruction, residual and a part of the squared norm of the residual of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    total = sum_of_pairs(
        indices, values, table, tl.load(offsets + row), tl.load(offsets + row + 1), width, column, PAIRS, WIDTH
    )
    total += tl.load(start + row * start_stride + column, mask=inside, other=0.0).to(tl.float32)
    # The error is that of the reconstruction as it is returned.
    total = total.to(out.dtype.element_ty)
    tl.store(out + row * width + column, total, mask=inside)
    error = total.to(tl.float32) - tl.load(targets + row * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual + row * width + column, error.to(residual.dtype.element_ty), mask=inside)
    tl.store(squared + row * tl.num_programs(1) + tl.program_id(1), tl.sum(error * error, axis=0))


def decode_error(
    offsets: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    start: torch.Tensor,
    targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    `start + sum of values * table[indices]` over each row's pairs, and how far that is from `targets`.

    Args:
        offsets, indices, values: Pairs, see `ops/pairs.py`.
        table (`torch.Tensor` of shape `(num_features, width)`): Decoder rows, contiguous.
        start (`torch.Tensor` of shape `(width,)` or `(rows, width)`): What is added: a bias, or a linear part of each row.
        targets (`torch.FloatTensor` of shape `(rows, width)`): Targets in fp32, contiguous.

    Returns:
        `tuple(torch.Tensor, torch.Tensor, torch.FloatTensor)`: reconstruction `(rows, width)` in the dtype of `values`,
        residual `(rows, width)` in that of `table`, and the residual's squared norm `(rows,)` in fp32.
    """
    rows, width = targets.shape
    out = torch.empty(rows, width, dtype=values.dtype, device=values.device)
    residual = torch.empty(rows, width, dtype=table.dtype, device=values.device)
    sizes = gathered_block(width, PAIRS_AT_A_TIME)
    squared = torch.empty(rows, tiles_of(width, sizes["WIDTH"]), dtype=torch.float32, device=values.device)
    with on_device_of(values):
        decode_error_kernel[(rows, squared.shape[1])](
            offsets, indices, values, table, start, width if start.dim() == 2 else 0, targets, out, residual, squared,
            width, **sizes, **COMPILER_OPTIONS,
        )  # fmt: skip
    return out, residual, squared.sum(1)
