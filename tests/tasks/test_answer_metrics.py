"""Metrics against plain loops, Wilson's interval against known values, and the coverage of the bootstrap."""

import math

import pytest
import torch

from hf_transcoders import TranscoderError
from hf_transcoders.tasks import (
    accuracy,
    bootstrap_interval,
    estimate,
    kl_divergence,
    logit_difference,
    probability_difference,
    rank,
    wilson_interval,
)


RIGHT = torch.tensor([[3, -1], [1, 4], [0, -1], [6, 2]])
WRONG = torch.tensor([[5, 6, -1], [0, -1, -1], [1, 2, 3], [0, 1, 5]])
CANDIDATES = torch.tensor([[3, 5, 6, -1, -1], [1, 4, 0, -1, -1], [0, 1, 2, 3, -1], [6, 2, 0, 1, 5]])


@pytest.fixture
def logits():
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(0)) * 3


def listed(ids):
    return [[id_ for id_ in row if id_ >= 0] for row in ids.tolist()]


def test_differences(logits):
    probabilities = torch.softmax(logits, -1)
    for row, (right, wrong) in enumerate(zip(listed(RIGHT), listed(WRONG), strict=True)):
        mean = sum(logits[row, i] for i in right) / len(right) - sum(logits[row, i] for i in wrong) / len(wrong)
        best = sum(logits[row, i] for i in right) / len(right) - max(logits[row, i] for i in wrong)
        share = sum(probabilities[row, i] for i in right) - sum(probabilities[row, i] for i in wrong)
        assert logit_difference(logits, RIGHT, WRONG)[row] == pytest.approx(mean.item(), abs=1e-5)
        assert logit_difference(logits, RIGHT, WRONG, against="max")[row] == pytest.approx(best.item(), abs=1e-5)
        assert probability_difference(logits, RIGHT, WRONG)[row] == pytest.approx(share.item(), abs=1e-6)


def test_accuracy_and_rank(logits):
    for row, (right, candidates) in enumerate(zip(listed(RIGHT), listed(CANDIDATES), strict=True)):
        order = sorted(range(7), key=lambda i: -logits[row, i])
        assert accuracy(logits, RIGHT)[row] == float(order[0] in right)
        among = max(candidates, key=lambda i: logits[row, i])
        assert accuracy(logits, RIGHT, CANDIDATES)[row] == float(among in right)
        assert rank(logits, RIGHT)[row] == 1 + min(order.index(i) for i in right)


def test_accuracy_by_hand():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [0.0, 1.0, 5.0, 2.0]])
    right, candidates = torch.tensor([[2], [2]]), torch.tensor([[2, 3], [2, 3]])
    assert accuracy(logits, right).tolist() == [0, 1]
    assert accuracy(logits, right, candidates).tolist() == [1, 1]
    assert rank(logits, right).tolist() == [2, 1]


def test_kl_divergence(logits):
    other = logits.flip(1)
    p, q = torch.softmax(logits.double(), -1), torch.softmax(other.double(), -1)
    torch.testing.assert_close(
        kl_divergence(other, logits).double(), (p * (p / q).log()).sum(-1), atol=1e-5, rtol=1e-5
    )
    assert kl_divergence(logits, logits).abs().max() < 1e-6


def test_half_precision_is_measured_in_full(logits):
    half = logits.bfloat16()
    assert probability_difference(half, RIGHT, WRONG).dtype == torch.float32
    torch.testing.assert_close(
        probability_difference(half, RIGHT, WRONG), probability_difference(half.float(), RIGHT, WRONG)
    )


@pytest.mark.parametrize(
    "successes, rows, low, high",
    [
        (0, 10, 0.0, 0.27753),
        (8, 10, 0.49016, 0.94331),
        (50, 100, 0.40383, 0.59617),
        (10, 10, 0.72247, 1.0),
        (1, 1, 0.20655, 1.0),
    ],
)
def test_wilson_interval(successes, rows, low, high):
    assert wilson_interval(successes, rows) == pytest.approx((low, high), abs=2e-5)


def test_wilson_widens_with_confidence():
    assert wilson_interval(30, 40, 0.99)[0] < wilson_interval(30, 40, 0.9)[0] < 0.75 < wilson_interval(30, 40, 0.9)[1]


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    held = 0
    for seed in range(300):
        low, high = bootstrap_interval(torch.randn(60, generator=generator) + 2, 0.9, resamples=500, seed=seed)
        held += low <= 2 <= high
    assert 0.84 <= held / 300 <= 0.95


def test_bootstrap_is_as_wide_as_the_normal_interval():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(2))
    low, high = bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / math.sqrt(2000), rel=0.08)
    assert (low + high) / 2 == pytest.approx(values.mean().item(), abs=0.005)


def test_bootstrap_is_deterministic():
    values = torch.arange(30.0)
    assert (
        bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)
    )
    state = torch.get_rng_state()
    bootstrap_interval(values)
    assert torch.equal(torch.get_rng_state(), state)


def test_estimate():
    share = estimate(torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 1, 0, 0]), share=True)
    assert share.mean == 0.8 and share.method == "wilson"
    assert (share.low, share.high) == wilson_interval(8, 10)
    assert str(share) == "0.800 [0.490, 0.943]"
    mean = estimate(torch.full((9,), 2.5))
    assert mean.to_dict() == {
        "mean": 2.5, "low": 2.5, "high": 2.5, "rows": 9, "method": "bootstrap", "confidence": 0.95,
    }  # fmt: skip


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: logit_difference(x, RIGHT, WRONG, "median"), "cannot be taken against 'median'"),
        (lambda x: logit_difference(x[0], RIGHT, WRONG), "shape"),
        (lambda x: logit_difference(x, RIGHT[:2], WRONG), "shape"),
        (lambda x: logit_difference(x, RIGHT, torch.full((4, 1), -1)), "Row 0 has no answer to compare with"),
        (lambda x: accuracy(x[:, :5], RIGHT), "token 6, but there are logits of 5 tokens"),
        (lambda x: kl_divergence(x, x[:2]), "logits of the same shape"),
        (lambda x: wilson_interval(3, 2), "3 of 2 rows cannot be right"),
        (lambda x: wilson_interval(0, 0), "at least one row"),
        (lambda x: bootstrap_interval(x[0], confidence=1.5), "confidence between 0 and 1"),
    ],
)
def test_wrong_input(logits, call, message):
    with pytest.raises(TranscoderError, match=message) as error:
        call(logits)
    assert "\n" not in str(error.value)
