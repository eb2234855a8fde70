"""Histograms of the activations of features, counted in one pass without knowing the largest activation in advance."""

from dataclasses import dataclass

import torch


#: Number of bins that are kept for each feature.
NUM_BINS = 128


@dataclass
class ActivationHistogram:
    """The distribution of the activations of a feature.

    Args:
        counts (`list[int]`):
            Number of tokens with an activation in each bin, from 0 to the largest activation: bin `i` counts activations
            above `i * width`, up to and including `(i + 1) * width`. Empty for a feature that never fired.
        width (`float`): Width of a bin, a power of two.
    """

    counts: list[int]
    width: float

    def quantiles(self, shares: list[float]) -> list[float]:
        """Quantiles of the activations on the tokens on which the feature is active.

        Args:
            shares (`list[float]`): Shares of those tokens, above 0 and up to 1.

        Returns:
            `list[float]`: the activation that each share does not exceed, to within the width of a bin. Empty for a feature
            that never fired.
        """
        if not self.counts:
            return []
        counts = torch.tensor(self.counts, dtype=torch.float64)
        reached = counts.cumsum(0)
        wanted = torch.tensor(shares, dtype=torch.float64) * reached[-1]
        bins = torch.searchsorted(reached, wanted).clamp(max=len(counts) - 1)
        # Activations are taken as evenly spread within a bin.
        inside = (wanted - (reached - counts)[bins]) / counts[bins]
        return ((bins + inside) * self.width).tolist()


class RunningHistograms:
    """Histograms of several features so far, in a fixed number of bins.

    The bins of a feature are as wide as its largest activation so far asks for. Where a larger one comes, pairs of bins are
    merged, so that the counts are those of a histogram with the final width from the start.

    Args:
        num_features (`int`): Number of features.
        device (`torch.device`): Device of the activations.
    """

    def __init__(self, num_features: int, device: torch.device):
        self.counts = torch.zeros(num_features, NUM_BINS, dtype=torch.int32, device=device)
        # All bins together reach up to `2 ** exponent`.
        self.exponent = torch.full((num_features,), -(2**20), dtype=torch.int32, device=device)

    def widen(self, features: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge bins until they reach new activations.

        Args:
            features (`torch.LongTensor` of shape `(firings,)`): The feature of each activation.
            values (`torch.FloatTensor` of shape `(firings,)`): Activations, positive and finite.

        Returns:
            `tuple[torch.LongTensor, torch.LongTensor]`: features whose bins were merged, and how often they were doubled.
        """
        largest = torch.zeros(len(self.counts), device=values.device).scatter_reduce(0, features, values, "amax")
        mantissa, exponent = torch.frexp(largest)
        # The last bin includes its end, so that a power of two fits.
        exponent = exponent.int() - (mantissa == 0.5).int()
        grows = ((largest > 0) & (exponent > self.exponent)).nonzero()[:, 0]
        shift = (exponent - self.exponent)[grows].clamp(max=NUM_BINS.bit_length()).long()
        bins = torch.arange(NUM_BINS, device=largest.device) >> shift[:, None]
        old = self.counts[grows]
        self.counts[grows] = torch.zeros_like(old).scatter_add(1, bins, old)
        self.exponent[grows] = exponent[grows]
        return grows, shift

    def count(self, features: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Count activations, after [`widen`] with the same arguments, and give the bin of each, `(firings,)`."""
        # Scaled by a power of two, activations stay exact.
        scaled = torch.ldexp(values, (NUM_BINS.bit_length() - 1) - self.exponent[features])
        bins = (scaled.ceil().long() - 1).clamp(min=0)
        ones = torch.ones_like(bins, dtype=torch.int32)
        self.counts.view(-1).index_add_(0, features * NUM_BINS + bins, ones)
        return bins

    def histogram(self, number: int) -> ActivationHistogram:
        """The histogram of one of the features, without the empty bins above its largest activation."""
        return histogram_of(self.counts[number], int(self.exponent[number]))


def histogram_of(counts: torch.Tensor, exponent: int) -> ActivationHistogram:
    """The histogram of bins `(NUM_BINS,)` that reach up to `2 ** exponent`, without the empty ones above the largest."""
    listed = counts.tolist()
    while listed and not listed[-1]:
        listed.pop()
    return ActivationHistogram(listed, 2.0**exponent / NUM_BINS if listed else 0.0)
