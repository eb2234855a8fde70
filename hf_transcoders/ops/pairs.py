"""Sums over sparse features in plain PyTorch: the reference of every kernel, and what runs where there is none.

Sparse features of a batch are pairs of a row and a feature, row by row: `offsets (rows + 1,)` says where each row begins,
`indices (n_pairs,)` are the numbers of the features and `values (n_pairs,)` their activations. `ops/dispatch.py` chooses
between these sums, those of `ops/pairs_dense.py` and those of `ops/triton/pairs_triton.py`.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


# Without MKL there is no sampled product on CPU; rows are then gathered in pieces of this many numbers.
_GATHER_CHUNK = 1 << 24

# PyTorch warns once per process that CSR tensors are in beta, and every user of a TopK dictionary would see it. Only the
# pattern of one is used here, so the first is made where nobody is warned; later ones cost nothing.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1))


class SharedOrder:
    """The order of pairs by feature, sorted once and shared by all gradients of one batch of pairs."""

    def __init__(self):
        self._made: dict[Callable, Any] = {}

    def get(self, make: Callable, *args: Any) -> Any:
        """`make(*args)`, computed by the first caller. All callers must give the same pairs."""
        if make not in self._made:
            self._made[make] = make(*args)
        return self._made[make]


def row_numbers(offsets: torch.Tensor, n_pairs: int) -> torch.Tensor:
    """The row that each pair belongs to, shape `(n_pairs,)`."""
    rows = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=n_pairs)


class PairSums:
    """Sums over pairs; [`DensePairSums`] and [`TritonPairSums`] have the same four functions."""

    @staticmethod
    def weighted_rows(
        offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        """`out[b] = sum of values * table[indices]` over row b's pairs, shape `(rows, width)`."""
        if indices.numel() == 0:
            return table.new_zeros(offsets.numel() - 1, table.shape[1])
        return F.embedding_bag(
            indices, table, offsets, mode="sum", per_sample_weights=values.to(table.dtype), include_last_offset=True
        )

    @staticmethod
    def paired_dots(
        offsets: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        """`rows[b] . table[i]` for every pair (b, i), shape `(n_pairs,)`."""
        rows, table = rows.contiguous(), table.to(rows.dtype)
        if rows.dtype in (torch.float32, torch.float64) and (rows.is_cuda or torch.backends.mkl.is_available()):
            shape = rows.shape[0], table.shape[0]
            pattern = torch.sparse_csr_tensor(
                offsets, indices, rows.new_zeros(indices.numel()), shape, check_invariants=False
            )
            return torch.sparse.sampled_addmm(pattern, rows, table.T, beta=0.0).values()
        step = max(1, _GATHER_CHUNK // rows.shape[1])
        pieces = zip(row_numbers(offsets, indices.numel()).split(step), indices.split(step), strict=True)
        dots = [(rows[r] * table[i]).sum(-1) for r, i in pieces]
        return torch.cat(dots) if dots else rows.new_zeros(0)

    @staticmethod
    def scatter_rows(
        offsets: torch.Tensor,
        indices: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        num_features: int,
        order: SharedOrder,
    ) -> torch.Tensor:
        """`out[i] = sum of values * rows[b]` over the pairs (b, i), shape `(num_features, width)`."""
        # Sorting the pairs by feature makes each output row one sum: no atomics, and the same bits every time.
        pairs, starts, sources = order.get(_by_feature, offsets, indices, num_features)
        return PairSums.weighted_rows(starts, sources, values[pairs], rows)

    @staticmethod
    def scatter_values(
        offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, num_features: int, order: SharedOrder
    ) -> torch.Tensor:
        """`out[i] = sum of values` over the pairs of feature i, shape `(num_features,)`."""
        return values.new_zeros(num_features).index_add_(0, indices, values)


def _by_feature(offsets, indices, num_features):
    """Pairs in the order of their features, where each feature begins `(num_features + 1,)`, and the rows of these pairs."""
    # Narrow keys sort several times faster.
    narrow = torch.int16 if num_features <= torch.iinfo(torch.int16).max else torch.int32
    pairs = indices.to(narrow).argsort(stable=True)
    starts = torch.zeros(num_features + 1, dtype=torch.long, device=indices.device)
    torch.cumsum(torch.bincount(indices, minlength=num_features), 0, out=starts[1:])
    return pairs, starts, row_numbers(offsets, indices.numel())[pairs]
