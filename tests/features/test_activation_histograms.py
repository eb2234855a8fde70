"""Histograms counted over batches equal those of all activations at once."""

import math

import numpy as np
import pytest
import torch

from hf_transcoders.features import explain_features
from hf_transcoders.features.activation_histograms import NUM_BINS, ActivationHistogram, RunningHistograms
from hf_transcoders.lm import capture
from tests.same_model import WordsOfIds

from ..evaluation.conftest import random_dictionary


def expected_histogram(values):
    """The histogram of positive values, from all of them together, in NumPy."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return [], 0.0
    reach = 2.0 ** math.ceil(math.log2(values.max()))
    width = reach / NUM_BINS
    bins = np.ceil(values / width).astype(int) - 1
    return np.bincount(bins).tolist(), width


def planted_activations():
    """Heavy tails, a feature that grows over the batches, exact powers of two, tiny values, and a feature that never fires."""
    random = torch.Generator().manual_seed(0)
    activations = torch.randn(12, 20, 6, generator=random).exp()
    activations[..., 1] *= torch.logspace(-6, 6, 12)[:, None]
    activations[..., 2] = 2.0 ** torch.randint(-9, 4, (12, 20), generator=random)
    activations[..., 3] *= 1e-30
    activations[..., 4] = 0
    activations[activations.new_empty(12, 20, 6).uniform_(generator=random) < 0.3] = 0
    activations[0, 0, 5] = -3.0
    return activations


def count(running, activations):
    """Count the activations `(blocks, seq, features)` above 0."""
    places = (activations > 0).nonzero()
    values = activations[activations > 0]
    running.widen(places[:, 2], values)
    running.count(places[:, 2], values)


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_batches_count_as_all_together(batch_size):
    activations = planted_activations()
    running = RunningHistograms(6, activations.device)
    for batch in activations.split(batch_size):
        count(running, batch)
    assert running.counts.shape == (6, NUM_BINS)
    for feature in range(6):
        column = activations[..., feature]
        counts, width = expected_histogram(column[column > 0])
        assert running.histogram(feature) == ActivationHistogram(counts, width), feature
    assert running.histogram(4).quantiles([0.5]) == []


def test_order_does_not_matter():
    activations = planted_activations()
    one, other = RunningHistograms(6, activations.device), RunningHistograms(6, activations.device)
    count(one, activations)
    for batch in activations.flip(0).split(1):
        count(other, batch)
    assert [one.histogram(i) for i in range(6)] == [other.histogram(i) for i in range(6)]


def test_quantiles_are_within_a_bin():
    values = planted_activations()[..., 0].flatten()
    values = values[values > 0]
    running = RunningHistograms(1, values.device)
    count(running, values[None, :, None])
    histogram = running.histogram(0)
    shares = [percent / 100 for percent in range(1, 101)]
    found = histogram.quantiles(shares)
    exact = np.quantile(values.double().numpy(), shares, method="inverted_cdf")
    assert np.abs(np.array(found) - exact).max() <= histogram.width
    assert found == sorted(found) and len(set(found)) > 50


@torch.no_grad()
def test_explained_features_have_the_histogram_of_the_text(base, blocks):
    dictionary = random_dictionary(base, 1, "relu")
    with capture(base, "layers.1.mlp.in") as activations:
        base(torch.tensor([row["input_ids"] for row in blocks]))
        dense = dictionary.encode(activations["layers.1.mlp.in"])
    dense[:, 0] = 0
    for explanation in explain_features(
        base, dictionary, blocks, WordsOfIds(), features="active", batch_size=2, progress=False
    ):
        column = dense[..., explanation.feature]
        counts, width = expected_histogram(column[column > 0])
        assert explanation.histogram.width == width
        # Activations of other batch sizes may round to the next bin.
        assert sum(explanation.histogram.counts) == sum(counts) == (column > 0).sum()
        assert np.abs(np.subtract(explanation.histogram.counts, counts)).sum() <= 2
