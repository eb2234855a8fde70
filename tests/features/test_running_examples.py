"""What is kept of a stream of activations equals what a look at all of them at once finds."""

import numpy as np
import pytest
import torch

from hf_transcoders.features.examples import ExampleText, FeatureExamples
from hf_transcoders.features.running_examples import NUM_INTERVALS, ExampleSizes, RunningExamples
from hf_transcoders.features.text_sample import sample_text

from ..evaluation.conftest import random_dictionary
from .test_text_sample import END, LENGTH, packed_rows


FEATURES, WINDOW = 8, 6


@pytest.fixture(scope="module")
def planted():
    """Text in documents of four lengths, one context that is there twice, and activations of eight features."""
    rows, documents = packed_rows([5, 9, 30, 12] * 150, seed=1)
    rows[50] = rows[10]  # The same text in another document.
    sample = sample_text([{"input_ids": row} for row in rows], max_tokens=10**6, separator=END)
    generator = torch.Generator().manual_seed(0)
    shape = len(rows), LENGTH, FEATURES
    activations = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.3)
    activations[..., 4] = activations[..., 3] * (torch.rand(shape[:2], generator=generator) < 0.7)
    activations[10, 8], activations[50, 8] = 5.0, 6.0
    activations[..., 5] = 0
    activations[3, 2, 5] = 1.0
    activations[..., 6] = 0
    activations[..., 7] *= torch.rand(shape[:2], generator=generator) < 0.05
    return sample, documents, activations


def collect(base, planted, batch_size=7, sizes=None, order=None):
    sample, _, activations = planted
    dictionary = random_dictionary(base, 0, "relu")
    sizes = sizes or ExampleSizes(window=WINDOW, top=4, random_tokens=16, random_windows=8, interval=3, silent=5)
    running = RunningExamples(range(FEATURES), dictionary, sample, sizes)
    numbers = torch.arange(len(activations)) if order is None else order
    for rows in numbers.split(batch_size):
        running.update(activations[rows].clone(), rows, torch.ones(len(rows), LENGTH, dtype=torch.bool))
    return FeatureExamples.of(running, ExampleText.of(sample))


def test_counts_are_exact(base, planted):
    found = collect(base, planted)
    activations = planted[2]
    assert found.num_tokens == activations[..., 0].numel()
    assert torch.equal(found.fired, (activations > 0).sum((0, 1)))
    torch.testing.assert_close(found.density, (activations > 0).double().mean((0, 1)))
    expected = activations.double().sum((0, 1)) / (activations > 0).sum((0, 1)).clamp(min=1)
    torch.testing.assert_close(found.mean_activation, expected)
    for first, last, share, mean in found.by_position(0):
        column = activations[:, first : last + 1, 0]
        assert share == pytest.approx((column > 0).float().mean().item())
        assert mean == pytest.approx(column[column > 0].mean().item())
    assert found.by_position(0)[-1][1] >= LENGTH - 1


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_top_examples_equal_a_full_sort(base, planted, batch_size):
    sample, _, activations = planted
    # The documents of all tokens, numbered from 0.
    documents = sample.documents
    numbers = torch.unique(documents, return_inverse=True)[1]
    found = collect(base, planted, batch_size)
    for feature in range(FEATURES):
        peaks, positions = activations[..., feature].max(1)
        taken, contexts, expected = set(), set(), []
        for row in peaks.argsort(descending=True, stable=True).tolist():
            place = (row, int(positions[row]))
            document, context = int(documents[place]), int(sample.contexts[place])
            # Weaker ones of a document or context are dropped, even where the stronger one is dropped itself.
            if peaks[row] > 0 and document not in taken and context not in contexts and len(expected) < 4:
                expected.append(place)
            taken.add(document)
            contexts.add(context)
        assert [(w.row, w.position) for w in found.windows(feature, "top")] == expected
        for window in found.windows(feature, "top"):
            assert window.value == float(activations[window.row, window.position, feature])
            tokens = sample.blocks.texts[window.row][window.start : window.start + WINDOW].tolist()
            assert window.tokens == tokens and len(tokens) == WINDOW
            real = activations[window.row, window.start : window.start + WINDOW, feature]
            torch.testing.assert_close(torch.tensor(window.activations), real, rtol=1e-3, atol=1e-6)
            assert window.document == int(numbers[window.row, window.position])


def test_examples_of_a_group_are_of_different_documents(base, planted):
    found = collect(base, planted)
    for feature in range(FEATURES):
        for group in found.groups:
            if group != "interval":
                documents = [window.document for window in found.windows(feature, group)]
                assert len(set(documents)) == len(documents), group


def test_random_tokens_stand_for_the_quantiles(base, planted):
    found, activations = collect(base, planted), planted[2]
    for feature in range(4):
        active = activations[..., feature][activations[..., feature] > 0]
        quantiles = found.quantiles(feature, 4, 2)
        assert list(quantiles) == ["75-100%", "50-75%", "25-50%", "0-25%"]
        values = [window.value for windows in quantiles.values() for window in windows]
        ranks = [float((active <= value).float().mean()) for value in values]
        assert len(ranks) == 8 and ranks == sorted(ranks, reverse=True)
        # The rank in 16 random ones is the quantile, but for chance.
        assert all(abs(rank - (7.5 - i) / 8) < 0.35 for i, rank in enumerate(ranks))
    assert [(w.row, w.position) for w in found.windows(5, "top")] == [(3, 2)]
    # Its one example is the top one.
    assert found.quantiles(5) == {} and found.windows(6, "top") == []


def test_random_windows_are_of_random_rows(base, planted):
    """Each row in which a feature fires is as likely as another: the mean row number is that of all of them."""
    found, activations = collect(base, planted), planted[2]
    for feature in range(4):
        windows = found.windows(feature, "random_windows")
        assert len(windows) == 8
        for window in windows:
            assert window.value == float(activations[window.row, :, feature].max())
    rows = [window.row for feature in (0, 1, 2, 3, 7) for window in found.windows(feature, "random_windows")]
    firing = (activations[..., 7] > 0).any(1)
    assert all(firing[window.row] for window in found.windows(7, "random_windows"))
    assert abs(np.mean(rows) - len(activations) / 2) < 3.5 * len(activations) / np.sqrt(12 * 16)


def test_intervals_have_equal_width_and_count_every_token(base, planted):
    found, activations = collect(base, planted), planted[2]
    for feature in range(FEATURES):
        column = activations[..., feature]
        intervals = found.intervals(feature)
        if not (column > 0).any():
            assert intervals == []
            continue
        assert len(intervals) <= NUM_INTERVALS and intervals[-1].low == 0
        assert intervals[0].high >= column.max() > intervals[0].low
        for interval in intervals:
            assert interval.high - interval.low == intervals[0].high - intervals[0].low
            inside = (column > interval.low) & (column <= interval.high)
            # Zeros are in no interval.
            assert interval.count == inside.sum()
            assert all(interval.low < window.value <= interval.high for window in interval.windows)
            assert (len(interval.windows) > 0) == (interval.count > 0)
            assert len(interval.windows) <= 3


def test_silent_windows_are_silent_and_near_misses_are_near(base, planted):
    sample, _, activations = planted
    found = collect(base, planted)
    for feature in (5, 6, 7):
        for group in ("silent", "neighbors", "same_token"):
            for window in found.windows(feature, group):
                assert window.start % WINDOW == 0 and len(window.tokens) == WINDOW
                its = activations[window.row, window.start : window.start + WINDOW]
                assert not (its[:, feature] > 0).any() and not any(window.activations)
        assert len(found.windows(feature, "silent")) == 5
        assert len(found.windows(feature, "neighbors")) == 10
    assert found.windows(6, "same_token") == []
    (top,) = found.windows(5, "top")
    token = top.tokens[top.peak]
    assert found.windows(5, "same_token")
    assert all(token in window.tokens for window in found.windows(5, "same_token"))


def test_correlations_are_those_of_all_tokens(base, planted):
    activations = planted[2]
    found = collect(base, planted, sizes=ExampleSizes(window=WINDOW, sketch=4096))
    exact = np.corrcoef(activations.reshape(-1, FEATURES)[:, [0, 1, 2, 3, 4, 5, 7]].T)
    (first, value) = found.correlated_features(3)[0]
    assert first == 4 and abs(value - exact[3, 4]) < 4 * found.correlation_error
    assert found.correlated_features(4)[0][0] == 3
    for feature in (0, 1, 2):
        for _, value in found.correlated_features(feature):
            assert value > 4 * found.correlation_error
    assert found.correlated_features(6) == []
    # Whatever shares a batch.
    other = collect(base, planted, batch_size=33, sizes=ExampleSizes(window=WINDOW, sketch=4096))
    torch.testing.assert_close(other.correlations, found.correlations, atol=1e-4, rtol=1e-4)


def test_the_order_of_batches_does_not_matter_for_counts(base, planted):
    one = collect(base, planted)
    other = collect(base, planted, batch_size=50)
    assert torch.equal(one.bins, other.bins) and torch.equal(one.exponents, other.exponents)
    assert torch.equal(one.position_counts, other.position_counts)
