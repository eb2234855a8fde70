"""Products of rows and features for pairs alone: gradients of activations, and their values in full precision."""

import torch
import triton
import triton.language as tl

from .launching import COMPILER_OPTIONS, gathered_block, on_device_of, tiles_of


# Pairs that a program reads at a time.
PAIRS_AT_A_TIME = 16


@triton.jit
def pair_dots_kernel(
    row_numbers, indices, rows, table, out, n_pairs, width, PAIRS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """`rows[b] . table[i]` of a few pairs (b, i)."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < n_pairs
    left = tl.load(row_numbers + pair, mask=inside, other=0).to(tl.int64) * width
    right = tl.load(indices + pair, mask=inside, other=0).to(tl.int64) * width
    column = tl.arange(0, WIDTH)
    total = tl.zeros((PAIRS, WIDTH), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        mask = inside[:, None] & (start + column < width)[None, :]
        a = tl.load(rows + left[:, None] + start + column[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(table + right[:, None] + start + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += a * b
    tl.store(out + pair, tl.sum(total, axis=1), mask=inside)


def pair_dots(
    row_numbers: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """
    `rows[row_numbers[p]] . table[indices[p]]` for every pair p.

    Args:
        row_numbers, indices (`torch.LongTensor` of shape `(n_pairs,)`): Row and feature of each pair.
        rows (`torch.Tensor` of shape `(rows, width)`): Rows, contiguous.
        table (`torch.Tensor` of shape `(num_features, width)`): Rows of the features, contiguous.

    Returns:
        `torch.FloatTensor` of shape `(n_pairs,)`, summed in fp32.
    """
    out = torch.empty(len(indices), dtype=torch.float32, device=indices.device)
    if len(indices):
        sizes = gathered_block(rows.shape[1], PAIRS_AT_A_TIME)
        with on_device_of(rows):
            pair_dots_kernel[(tiles_of(len(indices), sizes["PAIRS"]),)](
                row_numbers, indices, rows, table, out, len(indices), rows.shape[1], **sizes, **COMPILER_OPTIONS
            )
    return out
