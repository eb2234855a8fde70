"""The sums of `ops/pairs.py` by kernels."""

import torch

from ..pairs import PairSums, SharedOrder, row_numbers
from .pair_dots import pair_dots
from .segment_sums import Segments, in_pieces, segment_sums


class TritonPairSums(PairSums):
    """The sums of [`PairSums`], by kernels."""

    @staticmethod
    def weighted_rows(
        offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        """See [`PairSums.weighted_rows`]; in the dtype of `values`."""
        return segment_sums(in_pieces(offsets, len(indices)), indices, values.contiguous(), table.contiguous())

    @staticmethod
    def paired_dots(
        offsets: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        """See [`PairSums.paired_dots`]; in fp32."""
        return pair_dots(row_numbers(offsets, len(indices)), indices, rows.contiguous(), table.contiguous())

    @staticmethod
    def scatter_rows(
        offsets: torch.Tensor,
        indices: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        num_features: int,
        order: SharedOrder,
    ) -> torch.Tensor:
        """See [`PairSums.scatter_rows`]; in the dtype of `values`."""
        pairs, segments, sources = order.get(by_feature, offsets, indices, num_features)
        return segment_sums(segments, sources, values[pairs], rows.contiguous())

    @staticmethod
    def scatter_values(
        offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, num_features: int, order: SharedOrder
    ) -> torch.Tensor:
        """See [`PairSums.scatter_values`]; the same bits every time, which `index_add_` on a GPU does not give."""
        ones = values.new_ones(len(offsets) - 1, 1)
        return TritonPairSums.scatter_rows(offsets, indices, values, ones, num_features, order).squeeze(1)


def by_feature(
    offsets: torch.Tensor, indices: torch.Tensor, num_features: int
) -> tuple[torch.Tensor, Segments, torch.Tensor]:
    """Pairs in the order of their features `(n_pairs,)`, the segments of features, and the rows of these pairs."""
    narrow = torch.int16 if num_features <= torch.iinfo(torch.int16).max else torch.int32
    features, pairs = indices.to(narrow).sort(stable=True)
    numbers = torch.arange(num_features + 1, dtype=narrow, device=indices.device)
    starts = torch.searchsorted(features, numbers)
    return pairs, in_pieces(starts, len(indices)), row_numbers(offsets, len(indices))[pairs]
