"""Weighted sums of rows of a table over segments of pairs: the decoder's forward pass, and gradients of all weights."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launching import COMPILER_OPTIONS, gathered_block, on_device_of, tiles_of


# Pairs in one piece of a segment. A feature that is active in a third of the tokens would else keep one program busy long
# after all others have finished.
PIECE = 256
# Pairs that a program reads at a time.
PAIRS_AT_A_TIME = 8


@dataclass(frozen=True)
class Segments:
    """
    Segments of pairs that lie one after the other, and their division into pieces.

    Args:
        offsets (`torch.LongTensor` of shape `(segments + 1,)`): Where each segment begins.
        owners (`torch.LongTensor` of shape `(pieces,)`): Segment of every piece but the first of each segment. `pieces` is the
            largest possible number; those that are not needed have the number of segments as their owner.
        piece_offsets (`torch.LongTensor` of shape `(segments + 1,)`): Where the pieces of each segment begin in `owners`.
    """

    offsets: torch.Tensor
    owners: torch.Tensor
    piece_offsets: torch.Tensor


def in_pieces(offsets: torch.Tensor, n_pairs: int, piece: int = PIECE) -> Segments:
    """Divides segments into pieces of at most `piece` pairs, without waiting for the device."""
    further = ((offsets.diff() - 1).clamp(min=0)) // piece
    piece_offsets = torch.zeros_like(offsets)
    torch.cumsum(further, 0, out=piece_offsets[1:])
    numbers = torch.arange(n_pairs // piece, device=offsets.device)
    return Segments(offsets, torch.searchsorted(piece_offsets, numbers, right=True) - 1, piece_offsets)


@triton.jit
def sum_of_pairs(
    sources, values, table, first, last, width, column, PAIRS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """`sum of values * table[sources]` over the pairs from `first` to `last`, `(WIDTH,)` in fp32, in a fixed order."""
    pair = tl.arange(0, PAIRS)
    total = tl.zeros((PAIRS, WIDTH), dtype=tl.float32)
    for start in range(first, last, PAIRS):
        inside = start + pair < last
        source = tl.load(sources + start + pair, mask=inside, other=0).to(tl.int64)
        value = tl.load(values + start + pair, mask=inside, other=0.0).to(tl.float32)
        mask = inside[:, None] & (column < width)[None, :]
        rows = tl.load(table + source[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += value[:, None] * rows
    return tl.sum(total, axis=0)


@triton.jit
def further_pieces_kernel(
    offsets, owners, piece_offsets, sources, values, table, partial, segments, width,
    PIECE: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum of one piece of a long segment, other than its first."""
    number = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + number)
    if owner < segments:
        begin = tl.load(offsets + owner)
        first = begin + (number - tl.load(piece_offsets + owner) + 1) * PIECE
        last = tl.minimum(first + PIECE, tl.load(offsets + owner + 1))
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        total = sum_of_pairs(sources, values, table, first, last, width, column, PAIRS, WIDTH)
        tl.store(partial + number * width + column, total, mask=column < width)


@triton.jit
def segment_sums_kernel(
    offsets, piece_offsets, sources, values, table, partial, out, width,
    PIECE: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum of one segment: its first piece here, then the sums of further ones in order."""
    segment = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + segment)
    last = tl.minimum(first + PIECE, tl.load(offsets + segment + 1))
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = sum_of_pairs(sources, values, table, first, last, width, column, PAIRS, WIDTH)
    for piece in range(tl.load(piece_offsets + segment), tl.load(piece_offsets + segment + 1)):
        total += tl.load(partial + piece * width + column, mask=column < width, other=0.0)
    tl.store(out + segment * width + column, total.to(out.dtype.element_ty), mask=column < width)


def segment_sums(
    segments: Segments, sources: torch.Tensor, values: torch.Tensor, table: torch.Tensor, piece: int = PIECE
) -> torch.Tensor:
    """
    `out[s] = sum of values[p] * table[sources[p]]` over the pairs p of segment s, in a fixed order without atomics.

    Args:
        segments ([`Segments`]): Segments of the pairs, divided by `piece`.
        sources (`torch.LongTensor` of shape `(n_pairs,)`): Row of the table of each pair.
        values (`torch.Tensor` of shape `(n_pairs,)`): Weight of each pair.
        table (`torch.Tensor` of shape `(table_rows, width)`): Rows, contiguous.
        piece (`int`, *optional*, defaults to 256): Pairs in a piece.

    Returns:
        `torch.Tensor` of shape `(segments, width)`, in the dtype of `values`, summed in fp32.
    """
    count, width = len(segments.offsets) - 1, table.shape[1]
    out = torch.empty(count, width, dtype=values.dtype, device=values.device)
    partial = torch.empty(len(segments.owners), width, dtype=torch.float32, device=values.device)
    sizes = gathered_block(width, PAIRS_AT_A_TIME)
    across = tiles_of(width, sizes["WIDTH"])
    with on_device_of(values):
        if len(partial):
            further_pieces_kernel[(len(partial), across)](
                segments.offsets, segments.owners, segments.piece_offsets, sources, values, table, partial, count, width,
                PIECE=piece, **sizes, **COMPILER_OPTIONS,
            )  # fmt: skip
        if count:
            segment_sums_kernel[(count, across)](
                segments.offsets,
                segments.piece_offsets,
                sources,
                values,
                table,
                partial,
                out,
                width,
                PIECE=piece,
                **sizes,
                **COMPILER_OPTIONS,
            )
    return out
