"""The largest scores of every tile of the encoder's product, without storing the product."""

import torch
import triton
import triton.language as tl

from .launching import COMPILER_OPTIONS, INTERPRETED, on_device_of, tiles_of
from .product_tile import product_tile, tile_position


# Columns of a tile. Wider tiles make fewer candidates, narrower ones fewer rows that fail the certificate.
COLUMNS = 128
_LOWEST, _LOWEST_WIDE = tl.constexpr(-(2**31)), tl.constexpr(-(2**63))


@triton.jit
def tile_topk_kernel(
    inputs, weight, bias, keys, rows, features, width, tiles,
    KEPT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """
    The `KEPT` largest scores of one block of rows and one tile of columns, largest first.

    A key holds the bits of a score, changed so that keys sort as scores do, above the inverted column: the lowest column wins
    a tie. With `WIDE` that is 64 bits. Otherwise keys are compared as 32 bits, the lowest of which are the column in the tile
    in place of the last bits of the score (7 of 24 with 128 columns, far less than the rounding of bf16 factors).
    """
    block, tile = tile_position(rows, tiles, ROWS, GROUP)
    scores = product_tile(
        inputs, weight, bias, rows, features, width, block, tile, ROWS, COLUMNS, DEPTH, EVEN, PRECISION, UPCAST
    )
    bits = scores.to(tl.int32, bitcast=True)
    sortable = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    # NaN of either sign must win: a row of NaN is not one without active features.
    sortable = tl.where(scores == scores, sortable, 0x7FC00000)
    local = tl.arange(0, COLUMNS)
    outside = (tile * COLUMNS + local >= features)[None, :]
    if WIDE:
        lowest = tl.full((), _LOWEST_WIDE, dtype=tl.int64)
        key = (sortable.to(tl.int64) << 32) | (COLUMNS - 1 - local)[None, :].to(tl.int64)
    else:
        lowest = tl.full((), _LOWEST, dtype=tl.int32)
        key = (sortable & (-COLUMNS)) | (COLUMNS - 1 - local)[None, :]
    key = tl.where(outside, lowest, key)
    row = block * ROWS + tl.arange(0, ROWS)
    place = keys + (row.to(tl.int64) * tiles + tile) * KEPT
    # Few rounds of a maximum are cheaper than a sort of the tile, and need no exchange through shared memory.
    for kept in tl.static_range(KEPT):  # pyright: ignore[reportGeneralTypeIssues]
        best = tl.max(key, axis=1)
        key = tl.where(key == best[:, None], lowest, key)  # pyright: ignore[reportCallIssue]
        if WIDE:
            score, column = best >> 32, best & (COLUMNS - 1)
        else:
            score, column = (best & (-COLUMNS)).to(tl.int64), (best & (COLUMNS - 1)).to(tl.int64)
        column = tile * COLUMNS + (COLUMNS - 1 - column)
        tl.store(place + kept, (score << 32) | (0xFFFFFFFF - column), mask=row < rows)


def tile_topk(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, kept: int, precision: str, columns: int = COLUMNS
) -> torch.Tensor:
    """
    The `kept` largest scores `inputs @ weight.T + bias` of every row and tile of columns, as sortable keys.

    Args:
        inputs (`torch.Tensor` of shape `(rows, width)`): Inputs, fp32, bf16 or fp16, contiguous.
        weight (`torch.Tensor` of shape `(num_features, width)`): Encoder rows of the same dtype, contiguous.
        bias (`torch.Tensor` of shape `(num_features,)`): Encoder bias.
        kept (`int`): Number of scores to keep of each tile.
        precision (`str`): `"ieee"` or `"tf32"`, for fp32 products. With `"ieee"` and fp32, scores are kept to the last bit.
        columns (`int`, *optional*, defaults to 128): Columns of a tile, a power of two of at least 16.

    Returns:
        `torch.LongTensor` of shape `(rows, tiles, kept)`: keys `(sortable bits of the score) << 32 | (2**32 - 1 - column)`,
        largest first. Where a tile has fewer columns, the rest has the lowest score.
    """
    rows, width = inputs.shape
    features = weight.shape[0]
    tiles = tiles_of(features, columns)
    keys = torch.empty(rows, tiles, kept, dtype=torch.long, device=inputs.device)
    wide = inputs.dtype == torch.float32
    settings = launch_settings(inputs.dtype)
    grid = (tiles_of(rows, settings["ROWS"]) * tiles,)
    with on_device_of(inputs):
        tile_topk_kernel[grid](
            inputs, weight, bias, keys, rows, features, width, tiles, KEPT=kept, WIDE=wide, COLUMNS=columns,
            EVEN=width % settings["DEPTH"] == 0, PRECISION=precision, UPCAST=INTERPRETED, **settings,
            **COMPILER_OPTIONS,
        )  # fmt: skip
    return keys


def launch_settings(dtype: torch.dtype) -> dict[str, int]:
    """Sizes of a block, and warps and stages, of the kernels that select while the product is in registers."""
    if INTERPRETED:
        return {"ROWS": 16, "DEPTH": 32, "GROUP": 2}
    if dtype == torch.float32:
        return {"ROWS": 64, "DEPTH": 32, "GROUP": 16, "num_warps": 8, "num_stages": 3}
    return {"ROWS": 128, "DEPTH": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3}
