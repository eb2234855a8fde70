"""Features of which the pre-activation is above a threshold, found while a tile of the encoder's product is in registers."""

import torch
import triton
import triton.language as tl

from .launching import COMPILER_OPTIONS, INTERPRETED, on_device_of, tiles_of
from .product_tile import product_tile, tile_position
from .tile_topk import COLUMNS, launch_settings


# Features of a row that fit into its part of one tile. Rows with more in any tile are computed again by themselves.
CAPACITY = 16
_SCORES = 1 << 24


@triton.jit
def above_threshold_kernel(
    inputs, weight, bias, threshold, found, counts, rows, features, width, tiles,
    CAPACITY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Number and columns of the features above their threshold in one block of rows and one tile of columns."""
    block, tile = tile_position(rows, tiles, ROWS, GROUP)
    scores = product_tile(
        inputs, weight, bias, rows, features, width, block, tile, ROWS, COLUMNS, DEPTH, EVEN, PRECISION, UPCAST
    )
    local = tl.arange(0, COLUMNS)
    column = tile * COLUMNS + local
    least = tl.load(threshold + tl.minimum(column, features - 1))
    # A comparison with NaN is false: NaN passes, so that a row of NaN is not one without active features.
    passes = ((scores <= least[None, :]) == 0) & (column < features)[None, :]
    row = block * ROWS + tl.arange(0, ROWS)
    place = row.to(tl.int64) * tiles + tile
    count = tl.sum(passes.to(tl.int32), axis=1)
    tl.store(counts + place, count, mask=row < rows)
    # Few rows have more than a few in one tile, and rounds of a minimum need fewer registers than a prefix sum.
    waiting = tl.where(passes, local[None, :], COLUMNS)
    for slot in range(0, tl.minimum(tl.max(count, axis=0), CAPACITY)):
        first = tl.min(waiting, axis=1)
        waiting = tl.where(waiting == first[:, None], COLUMNS, waiting)  # pyright: ignore[reportCallIssue]
        tl.store(found + place * CAPACITY + slot, tile * COLUMNS + first, mask=(row < rows) & (slot < count))


def above_threshold(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    precision: str,
    columns: int = COLUMNS,
    capacity: int = CAPACITY,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pairs of rows and features with `inputs @ weight.T + bias > threshold`, row by row and in ascending order of features. NaN
    counts as above. A matrix of all scores never exists.

    Args:
        inputs, weight, bias, precision, columns: See [`tile_topk`].
        threshold (`torch.Tensor` of shape `(num_features,)`): Thresholds in fp32.
        capacity (`int`, *optional*, defaults to 16): Features of a row that fit into one tile.

    Returns:
        `tuple(torch.LongTensor, torch.LongTensor)`: `offsets (rows + 1,)` and `indices (n_pairs,)`.
    """
    rows, width = inputs.shape
    features = len(weight)
    tiles = tiles_of(features, columns)
    found = torch.empty(rows, tiles, capacity, dtype=torch.int32, device=inputs.device)
    counts = torch.empty(rows, tiles, dtype=torch.int32, device=inputs.device)
    settings = launch_settings(inputs.dtype)
    grid = (tiles_of(rows, settings["ROWS"]) * tiles,)
    with on_device_of(inputs):
        above_threshold_kernel[grid](
            inputs, weight, bias, threshold, found, counts, rows, features, width, tiles, CAPACITY=capacity,
            COLUMNS=columns, EVEN=width % settings["DEPTH"] == 0, PRECISION=precision, UPCAST=INTERPRETED, **settings,
            **COMPILER_OPTIONS,
        )  # fmt: skip
    overflowed = (counts > capacity).any(1)
    counts.masked_fill_(overflowed[:, None], 0)
    row, tile, slot = (torch.arange(capacity, device=counts.device) < counts[:, :, None]).nonzero(as_tuple=True)
    indices = found[row, tile, slot].long()
    again = overflowed.nonzero().squeeze(-1)
    if len(again):
        other_row, other_indices = _above(inputs, weight, bias, threshold, again)
        row, order = torch.cat([row, other_row]).sort(stable=True)
        indices = torch.cat([indices, other_indices])[order]
    offsets = torch.zeros(rows + 1, dtype=torch.long, device=inputs.device)
    torch.cumsum(torch.bincount(row, minlength=rows), 0, out=offsets[1:])
    return offsets, indices


def _above(inputs, weight, bias, threshold, numbers):
    """Rows and features above the threshold, for the rows with these numbers, by a product with all features."""
    rows, columns = [], []
    for some in numbers.split(max(1, _SCORES // len(weight))):
        scores = torch.addmm(bias.float(), inputs[some].float(), weight.float().T)
        row, column = (scores <= threshold).logical_not_().nonzero(as_tuple=True)
        rows.append(some[row])
        columns.append(column)
    return torch.cat(rows), torch.cat(columns)
