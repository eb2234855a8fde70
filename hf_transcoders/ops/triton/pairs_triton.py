"""The sums of `ops/pairs.py` by kernels."""

import torch

from ..pairs import SharedOrder, row_numbers
from .pair_dots import pair_dots
from .segment_sums import Segments, in_pieces, segment_sums


def weighted_rows(
    offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """See [`ops.pairs.weighted_rows`]; in the dtype of `values`."""
    return segment_sums(in_pieces(offsets, len(indices)), indices, values.contiguous(), table.contiguous())


def paired_dots(offsets: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """See [`ops.pairs.paired_dots`]; in fp32."""
    return pair_dots(row_numbers(offsets, len(indices)), indices, rows.contiguous(), table.contiguous())


def scatter_rows(
    offsets: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    num_features: int,
    order: SharedOrder,
) -> torch.Tensor:
    """See [`ops.pairs.scatter_rows`]; in the dtype of `values`."""
    pairs, segments, sources = order.get(by_feature, offsets, indices, num_features)
    return segment_sums(segments, sources, values[pairs], rows.contiguous())


def scatter_values(
    offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, num_features: int, order: SharedOrder
) -> torch.Tensor:
    """See [`ops.pairs.scatter_values`]; the same bits every time, which `index_add_` on a GPU does not give."""
    ones = values.new_ones(len(offsets) - 1, 1)
    return scatter_rows(offsets, indices, values, ones, num_features, order).squeeze(1)


def by_feature(
    offsets: torch.Tensor, indices: torch.Tensor, num_features: int
) -> tuple[torch.Tensor, Segments, torch.Tensor]:
    """Pairs in the order of their features `(n_pairs,)`, the segments of features, and the rows of these pairs."""
    narrow = torch.int16 if num_features <= torch.iinfo(torch.int16).max else torch.int32
    features, pairs = indices.to(narrow).sort(stable=True)
    numbers = torch.arange(num_features + 1, dtype=narrow, device=indices.device)
    starts = torch.searchsorted(features, numbers)
    return pairs, in_pieces(starts, len(indices)), row_numbers(offsets, len(indices))[pairs]
