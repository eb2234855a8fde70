"""Gradients against the formulas of arXiv 2407.14435, section 3, written element by element."""

import pytest
import torch

from hf_transcoders.ops import jumprelu, step


def draw(seed=0, rows=40, features=6):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    threshold = torch.rand(features, generator=generator, dtype=torch.float64)
    upstream = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return z.requires_grad_(), threshold.requires_grad_(), upstream


@pytest.mark.parametrize("bandwidth", [0.05, 0.5, 2.0])
def test_jumprelu(bandwidth):
    z, threshold, upstream = draw()
    out = jumprelu(z, threshold, bandwidth)
    assert torch.equal(out, torch.where(z > threshold, z, 0.0))
    out.backward(upstream)
    expected_z = torch.zeros_like(z)
    expected_threshold = torch.zeros_like(threshold)
    for t in range(z.shape[0]):
        for i in range(z.shape[1]):
            expected_z[t, i] = upstream[t, i] if z[t, i] > threshold[i] else 0.0
            kernel = 1.0 if abs((z[t, i] - threshold[i]) / bandwidth) < 0.5 else 0.0
            expected_threshold[i] += upstream[t, i] * -(threshold[i] / bandwidth) * kernel
    assert torch.equal(z.grad, expected_z)
    torch.testing.assert_close(threshold.grad, expected_threshold.detach())
    if bandwidth > 0.1:
        assert threshold.grad.abs().min() > 0


@pytest.mark.parametrize("bandwidth", [0.05, 0.5, 2.0])
def test_step(bandwidth):
    z, threshold, upstream = draw(1)
    out = step(z, threshold, bandwidth)
    assert torch.equal(out, (z > threshold).double())
    out.backward(upstream)
    kernel = (((z - threshold) / bandwidth).abs() < 0.5).double()
    torch.testing.assert_close(threshold.grad, (-(1 / bandwidth) * kernel * upstream).sum(0))
    assert z.grad is None or not z.grad.any()


def test_thresholds_in_full_precision_beside_low_precision_activations():
    z, threshold, upstream = draw(2)
    low, full = z.detach().bfloat16().requires_grad_(), threshold.detach().float().requires_grad_()
    out = jumprelu(low, full, 0.5)
    assert out.dtype == torch.bfloat16
    out.backward(upstream.bfloat16())
    assert full.grad.dtype == torch.float32
    reference = threshold.detach().float().requires_grad_()
    jumprelu(low.detach().float(), reference, 0.5).backward(upstream.bfloat16().float())
    torch.testing.assert_close(full.grad, reference.grad, rtol=2e-2, atol=1e-2)
