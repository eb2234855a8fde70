"""The sums of `ops/pairs.py` by dense products, for GPUs and dictionaries with few features per active one."""

import torch

from .pairs import PairSums, SharedOrder, row_numbers


class DensePairSums(PairSums):
    """The sums of [`PairSums`], by dense products."""

    @staticmethod
    def weighted_rows(
        offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        """See [`PairSums.weighted_rows`]."""
        return (_dense(offsets, indices, values.to(table.dtype), table.shape[0]) @ table).to(values.dtype)

    @staticmethod
    def paired_dots(
        offsets: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        """See [`PairSums.paired_dots`]."""
        return (rows.to(table.dtype) @ table.T)[row_numbers(offsets, indices.numel()), indices].to(rows.dtype)

    @staticmethod
    def scatter_rows(
        offsets: torch.Tensor,
        indices: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        num_features: int,
        order: SharedOrder,
    ) -> torch.Tensor:
        """See [`PairSums.scatter_rows`]."""
        return (_dense(offsets, indices, values.to(rows.dtype), num_features).T @ rows).to(values.dtype)

    @staticmethod
    def scatter_values(
        offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, num_features: int, order: SharedOrder
    ) -> torch.Tensor:
        """See [`PairSums.scatter_values`]."""
        return _dense(offsets, indices, values, num_features).sum(0)


def _dense(offsets, indices, values, num_features):
    dense = values.new_zeros(offsets.numel() - 1, num_features)
    dense[row_numbers(offsets, indices.numel()), indices] = values
    return dense
