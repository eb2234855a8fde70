"""The top k of the encoder's product from the largest scores of its tiles, with a certificate that they are the right ones."""

import math

import torch

from .launching import tiles_of
from .tile_topk import COLUMNS, tile_topk


# Features that are ranked at a time for rows that failed the certificate.
_FEATURES, _SCORES = 8192, 1 << 24


def topk_scores(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    kept: int,
    precision: str,
    columns: int = COLUMNS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Columns and scores of the `k` largest of `inputs @ weight.T + bias` in every row, largest first; the lowest column wins a
    tie, and NaN is larger than any number. A matrix of all scores never exists.

    A row is certified when no tile has kept only scores that are above the k-th: what the tile has dropped is then below it.
    Rows that fail are ranked again over all features, which waits for the GPU once a call.

    Args:
        inputs, weight, bias, precision, columns: See [`tile_topk`].
        k (`int`): Number of columns to choose.
        kept (`int`): Number of scores to keep of each tile, see [`kept_of_a_tile`]; at least `k` in all tiles together.

    Returns:
        `tuple(torch.LongTensor, torch.FloatTensor)`: columns and scores, each of shape `(rows, k)`. In bf16 and fp16, scores
        are cut to 17 bits.
    """
    candidates = tile_topk(inputs, weight, bias, kept, precision, columns)
    keys = candidates.view(len(inputs), -1).topk(k, dim=-1).values
    failed = (candidates[:, :, -1].amax(1) > keys[:, -1]).nonzero().squeeze(-1)
    if len(failed):
        keys[failed] = _ranked_keys(inputs[failed], weight, bias, k)
    return columns_of(keys), scores_of(keys)


def kept_of_a_tile(k: int, features: int) -> int | None:
    """
    How many scores to keep of each tile: 4, 8 or 16, so that less than one row in a million is expected to fail. `None` if
    even 16 are too few.

    With features in random order, the number of a row's top k in one tile is a Poisson variable with mean `k / tiles`, and a
    row fails when it reaches the number that is kept, in any tile.
    """
    tiles = tiles_of(features, COLUMNS)
    for kept in (4, 8, 16):
        if kept * tiles >= k and tiles * _poisson_tail(k / tiles, kept) < 1e-6:
            return kept
    return None


def _poisson_tail(mean: float, least: int) -> float:
    """Probability that a Poisson variable is at least `least`."""
    return sum(
        math.exp(number * math.log(mean) - mean - math.lgamma(number + 1)) for number in range(least, least + 40)
    )


def _ranked_keys(inputs, weight, bias, k):
    """The `k` largest keys of rows by the product with all features, a block of features at a time."""
    parts = []
    for some in inputs.split(_SCORES // _FEATURES):
        best = torch.empty(len(some), 0, dtype=torch.long, device=some.device)
        for start in range(0, len(weight), _FEATURES):
            # In fp32 as in the kernel, which does not round its sums to the dtype of the factors either.
            rows = weight[start : start + _FEATURES].float()
            scores = torch.addmm(bias[start : start + _FEATURES].float(), some.float(), rows.T)
            found = torch.cat([best, keys_of(scores, start)], dim=1)
            best = found.topk(min(k, found.shape[1]), dim=-1).values
        parts.append(best)
    return torch.cat(parts)


def keys_of(scores: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Sortable keys of fp32 `scores (rows, columns)` as [`tile_topk`] makes them; `first` is the number of the first column."""
    bits = scores.contiguous().view(torch.int32)
    sortable = torch.where(scores.isnan(), 0x7FC00000, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    column = torch.arange(first, first + scores.shape[1], device=scores.device)
    return (sortable.long() << 32) | (0xFFFFFFFF - column)


def columns_of(keys: torch.Tensor) -> torch.Tensor:
    """Column of each key, in the shape of `keys`."""
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def scores_of(keys: torch.Tensor) -> torch.Tensor:
    """Score of each key in fp32, in the shape of `keys`."""
    sortable = (keys >> 32).int()
    return (sortable ^ ((sortable >> 31) & 0x7FFFFFFF)).view(torch.float32)
