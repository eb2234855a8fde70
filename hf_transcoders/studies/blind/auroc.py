"""Areas under ROC curves of many scores at once, exact with ties, and their bootstrap."""

import torch


def midranks(scores: torch.Tensor) -> torch.Tensor:
    """Rank of each score in its row, from 1; equal scores share the mean of their ranks. `(..., tokens)` in fp64."""
    ordered, order = scores.sort(dim=-1)
    below, upto = _ties(ordered)
    ranks = (below + upto + 1) / 2
    return torch.empty_like(ranks, dtype=torch.float64).scatter_(-1, order, ranks.double())


def auroc(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How often a labelled token has a higher score than an unlabelled one; a tie counts half.

    The rank statistic (Mann-Whitney), for every row of scores with every row of labels.

    Args:
        scores (`torch.Tensor` of shape `(m, tokens)`): Scores.
        labels (`torch.BoolTensor` of shape `(n, tokens)`): Labels.

    Returns:
        `torch.Tensor` of shape `(m, n)` in fp64; NaN where all tokens or none are labelled.
    """
    labelled = labels.sum(-1).double()
    others = labels.shape[-1] - labelled
    sums = midranks(scores) @ labels.double().T
    return (sums - labelled * (labelled + 1) / 2) / (labelled * others)


def bootstrap_auroc(
    scores: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor, samples: int, seed: int
) -> torch.Tensor:
    """[`auroc`] of each row of scores with its own row of labels, when whole groups of tokens are drawn again.

    Args:
        scores (`torch.Tensor` of shape `(n, tokens)`), labels (`torch.BoolTensor` of shape `(n, tokens)`):
            As for [`auroc`], row by row.
        groups (`torch.LongTensor` of shape `(tokens,)`):
            The group of each token, from 0; groups are drawn with replacement.
        samples (`int`): How often.
        seed (`int`): The same seed draws the same groups.

    Returns:
        `torch.Tensor` of shape `(samples, n)` in fp64; NaN where a sample has no labelled token, or only such.
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
        labelled = weights[row, place]
        wins = labelled * (others[row, below] + others[row, upto]) / 2
        zeros = torch.zeros(len(scores), dtype=torch.float64)
        total = zeros.index_add(0, row, labelled) * others[:, -1]
        found[sample] = zeros.index_add(0, row, wins) / total
    return found


def _ties(ordered):
    """For each place of ascending rows, how many are smaller, and how many are smaller or equal."""
    ordered = ordered.contiguous()
    return torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True)
