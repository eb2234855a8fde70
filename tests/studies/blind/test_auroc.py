"""Areas against counting pairs, ties included, and the bootstrap against drawing tokens."""

import pytest
import torch

from hf_transcoders.studies.blind.auroc import auroc, bootstrap_auroc, midranks


def counted(scores, labels):
    """Share of pairs in the right order, pair by pair."""
    wins = [
        1.0 if high > low else 0.5 if high == low else 0.0
        for high in scores[labels].tolist()
        for low in scores[~labels].tolist()
    ]
    return sum(wins) / len(wins)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    # Few values, so that most pairs have ties among them.
    scores = torch.randint(6, (5, 40), generator=generator) / 3
    scores[3] = torch.randn(40, generator=generator)
    labels = torch.rand(4, 40, generator=generator) < 0.3
    return scores, labels


def test_every_pair_is_counted(data):
    scores, labels = data
    areas = auroc(scores, labels)
    for i in range(5):
        for j in range(4):
            assert areas[i, j].item() == pytest.approx(counted(scores[i], labels[j]), abs=1e-12)
    ordered = torch.arange(6.0)[None]
    assert auroc(ordered, ordered > 3).item() == 1 and auroc(-ordered, ordered > 3).item() == 0
    assert auroc(torch.zeros(1, 6), ordered > 3).item() == 0.5
    assert midranks(torch.tensor([[3.0, 1.0, 3.0, 0.0]])).tolist() == [[3.5, 2, 3.5, 1]]


def test_without_a_firing_there_is_no_area(data):
    scores, labels = data
    labels[0], labels[1] = False, True
    areas = auroc(scores, labels)
    assert areas[:, :2].isnan().all() and not areas[:, 2:].isnan().any()


def test_bootstrap_draws_whole_groups(data):
    scores, labels = data
    scores = scores[1:]
    groups = torch.arange(40) // 8
    samples = bootstrap_auroc(scores, labels, groups, 30, seed=3)
    generator = torch.Generator().manual_seed(3)
    for sample in samples:
        drawn = torch.randint(5, (5,), generator=generator)
        tokens = torch.cat([(groups == group).nonzero().flatten() for group in drawn])
        for i in range(4):
            part = labels[i, tokens]
            if part.any():
                assert sample[i].item() == pytest.approx(counted(scores[i, tokens], part), abs=1e-12)
            else:
                assert sample[i].isnan()
    assert torch.equal(bootstrap_auroc(scores, labels, groups, 30, seed=3).nan_to_num(), samples.nan_to_num())
