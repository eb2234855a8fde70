"""Rank correlation of two lists of numbers."""

import torch


def spearman_correlation(
    first: torch.Tensor, second: torch.Tensor, permutations: int = 5000, seed: int = 0
) -> tuple[float, float]:
    """Compute Spearman's rank correlation of two lists, with mean ranks for equal values, and its p-value from shuffles."""
    one, other = ranks(first), ranks(second)
    one, other = one - one.mean(), other - other.mean()
    scale = (one.norm() * other.norm()).item() if len(one) else 0
    if scale == 0:
        return float("nan"), float("nan")
    value = (one @ other).item() / scale
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(permutations, len(other), generator=generator).argsort(dim=1)
    shuffled = (other[order] @ one) / scale
    # The tolerance is for rounding errors.
    return value, (1 + (shuffled.abs() >= abs(value) - 1e-12).sum().item()) / (1 + permutations)


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks of values `(n,)` from 1 on, with the mean rank for equal values, in float64."""
    values = values.double()
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]
