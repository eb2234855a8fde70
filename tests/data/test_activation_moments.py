"""Streamed mean and covariance against those of all activations at once."""

import torch

from hf_transcoders.data.activation_moments import ActivationMoments


def test_parts_give_the_moments_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    # A mean a million times the deviation: sums of squares in float32 would lose every digit.
    values = torch.randn(700, 5, generator=generator, dtype=torch.float64) * 1e-2 + 1e4
    moments = ActivationMoments(5)
    for part in values.split([1, 0, 299, 400]):
        moments.update(part)
    assert moments.tokens == 700
    torch.testing.assert_close(moments.mean, values.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.covariance, values.T.cov(correction=0), rtol=1e-7, atol=1e-15)
    assert moments.covariance.diagonal().sqrt().mean() < 0.02
