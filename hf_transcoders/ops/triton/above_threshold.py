"""Features of which the pre-activation is above a threshold, found while a tile of the encoder's product is in registers."""

import torch
import triton
import triton.language as tl

from .launching import INTERPRETED, on_device_of, tiles_of
from .product_tile import product_tile, tile_position
from .tile_topk import COLUMNS, launch_settings


# Features of a row that fit into its part of one tile. Rows with more in any tile are computed again by themselves.
CAPACITY = 16
_SCORES = 1 << 24


@triton.jit
def above_threshold_kernel(
    inputs, weight, bias, threshold, columns, scores, counts, rows, features, width, tiles,
    CAPACITY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Number, columns and scores of the features above their threshold in one block of rows and one tile of columns."""
    block, tile = tile_position(rows, tiles, ROWS, GROUP)
    found = product_tile(
        inputs, weight, bias, rows, features, width, block, tile, ROWS, COLUMNS, DEPTH, EVEN, PRECISION, UPCAST
    )
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    least = tl.load(threshold + tl.minimum(column, features - 1))
    # A comparison with NaN is false: NaN passes, so that a row of NaN is not one without active features.
    passes = ((found <= least[None, :]) == 0) & (column < features)[None, :]
    row = block * ROWS + tl.arange(0, ROWS)
    place = row.to(tl.int64) * tiles + tile
    tl.store(counts + place, tl.sum(passes.to(tl.int32), axis=1), mask=row < rows)
    slot = tl.cumsum(passes.to(tl.int32), axis=1) - 1
    fits = passes & (slot < CAPACITY) & (row < rows)[:, None]
    target = place[:, None] * CAPACITY + slot
    tl.store(columns + target, tl.broadcast_to(column[None, :], (ROWS, COLUMNS)), mask=fits)
    tl.store(scores + target, found, mask=fits)


def above_threshold(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    precision: str,
    columns: int = COLUMNS,
    capacity: int = CAPACITY,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Pairs of rows and features with `inputs @ weight.T + bias > threshold`, row by row and in ascending order of features. NaN
    counts as above. A matrix of all scores never exists.

    Args:
        inputs, weight, bias, precision, columns: See [`tile_topk`].
        threshold (`torch.Tensor` of shape `(num_features,)`): Thresholds in fp32.
        capacity (`int`, *optional*, defaults to 16): Features of a row that fit into one tile.

    Returns:
        `tuple(torch.LongTensor, torch.LongTensor, torch.FloatTensor)`: `offsets (rows + 1,)`, and `indices` and scores
        `(n_pairs,)`.
    """
    rows, width = inputs.shape
    features = len(weight)
    tiles = tiles_of(features, columns)
    found = torch.empty(rows, tiles, capacity, dtype=torch.int32, device=inputs.device)
    scores = torch.empty(rows, tiles, capacity, dtype=torch.float32, device=inputs.device)
    counts = torch.empty(rows, tiles, dtype=torch.int32, device=inputs.device)
    settings = launch_settings(inputs.dtype)
    grid = (tiles_of(rows, settings["ROWS"]) * tiles,)
    with on_device_of(inputs):
        above_threshold_kernel[grid](
            inputs, weight, bias, threshold, found, scores, counts, rows, features, width, tiles, CAPACITY=capacity,
            COLUMNS=columns, EVEN=width % settings["DEPTH"] == 0, PRECISION=precision, UPCAST=INTERPRETED, **settings,
        )  # fmt: skip
    overflowed = (counts > capacity).any(1)
    counts.masked_fill_(overflowed[:, None], 0)
    row, tile, slot = (torch.arange(capacity, device=counts.device) < counts[:, :, None]).nonzero(as_tuple=True)
    indices, chosen = found[row, tile, slot].long(), scores[row, tile, slot]
    redone = overflowed.nonzero().squeeze(-1)
    if len(redone):
        row, indices, chosen = _merged(row, indices, chosen, *_above(inputs, weight, bias, threshold, redone))
    offsets = torch.zeros(rows + 1, dtype=torch.long, device=inputs.device)
    torch.cumsum(torch.bincount(row, minlength=rows), 0, out=offsets[1:])
    return offsets, indices, chosen


def _above(inputs, weight, bias, threshold, numbers):
    """Rows, features and scores above the threshold, for the rows with these numbers, by a product with all features."""
    found = []
    for some in numbers.split(max(1, _SCORES // len(weight))):
        scores = torch.addmm(bias.float(), inputs[some].float(), weight.float().T)
        row, column = (scores <= threshold).logical_not_().nonzero(as_tuple=True)
        found.append((some[row], column, scores[row, column]))
    return (torch.cat(parts) for parts in zip(*found, strict=True))


def _merged(row, indices, chosen, other_row, other_indices, other_chosen):
    """Two lists of pairs as one, row by row. No row is in both."""
    row = torch.cat([row, other_row])
    order = row.argsort(stable=True)
    return row[order], torch.cat([indices, other_indices])[order], torch.cat([chosen, other_chosen])[order]
