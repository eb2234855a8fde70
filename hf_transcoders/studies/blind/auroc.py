"""Areas under ROC curves for many scores at once, exact with ties, and their bootstrap."""

import torch


def midranks(scores: torch.Tensor) -> torch.Tensor:
    """Rank the scores of each row from 1, with the mean rank for equal scores, as `(..., tokens)` in fp64."""
    ordered, order = scores.sort(dim=-1)
    below, upto = _ties(ordered)
    ranks = (below + upto + 1) / 2
    return torch.empty_like(ranks, dtype=torch.float64).scatter_(-1, order, ranks.double())


def auroc(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the probability that a labeled token has a higher score than an unlabeled one; a tie counts half.

    This is the Mann-Whitney statistic of every row of scores with every row of labels.

    Args:
        scores (`torch.Tensor` of shape `(m, tokens)`): Scores.
        labels (`torch.BoolTensor` of shape `(n, tokens)`): Labels.

    Returns:
        `torch.Tensor` of shape `(m, n)` in fp64; NaN if all tokens or none are labeled.
    """
    labeled = labels.sum(-1).double()
    others = labels.shape[-1] - labeled
    sums = midranks(scores) @ labels.double().T
    return (sums - labeled * (labeled + 1) / 2) / (labeled * others)


def bootstrap_auroc(
    scores: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor, samples: int, seed: int
) -> torch.Tensor:
    """Bootstrap [`auroc`] of each row of scores with its own row of labels, by resampling groups of tokens.

    Args:
        scores (`torch.Tensor` of shape `(n, tokens)`), labels (`torch.BoolTensor` of shape `(n, tokens)`):
            Scores and labels, as for [`auroc`].
        groups (`torch.LongTensor` of shape `(tokens,)`):
            Group of each token, from 0; groups are drawn with replacement.
        samples (`int`): Number of bootstrap samples.
        seed (`int`): Seed for the bootstrap samples.

    Returns:
        `torch.Tensor` of shape `(samples, n)` in fp64; NaN if all tokens of a sample or none are labeled.
    """
    ordered, order = scores.sort(dim=-1)
    below, upto = _ties(ordered)
    labels = labels.gather(-1, order)
    row, place = labels.nonzero(as_tuple=True)
    below, upto = below[row, place], upto[row, place]
    count = int(groups.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(samples, len(scores), dtype=torch.float64)
    for sample in range(samples):
        drawn = torch.randint(count, (count,), generator=generator).bincount(minlength=count).double()
        weights = drawn[groups][order]
        others = torch.nn.functional.pad(weights.where(~labels, 0).cumsum(-1), (1, 0))
        labeled = weights[row, place]
        wins = labeled * (others[row, below] + others[row, upto]) / 2
        zeros = torch.zeros(len(scores), dtype=torch.float64)
        total = zeros.index_add(0, row, labeled) * others[:, -1]
        found[sample] = zeros.index_add(0, row, wins) / total
    return found


def _ties(ordered):
    """For each element of ascending rows, count the smaller ones, and the smaller or equal ones."""
    ordered = ordered.contiguous()
    return torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True)
