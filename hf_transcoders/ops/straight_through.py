"""Straight-through gradients for the threshold of a JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435, section 3)."""

import torch
from torch.autograd.function import once_differentiable


def jumprelu(pre_activations: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """
    `z · 1[z > θ]`. The pre-activation gets the true gradient, the threshold a kernel estimate of width `bandwidth` (Eq. 11).

    Args:
        pre_activations (`torch.Tensor` of shape `(..., num_features)`): z.
        threshold (`torch.Tensor` of shape `(num_features,)`): θ, not negative.
        bandwidth (`float`): ε, in the unit of the pre-activations.

    Returns:
        `torch.Tensor` of shape `(..., num_features)`.
    """
    return _JumpReLU.apply(pre_activations, threshold, bandwidth)


def step(pre_activations: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """`1[z > θ]`, the summand of L0, with the kernel estimate of its gradient in the threshold alone (Eq. 12)."""
    return _Step.apply(pre_activations, threshold, bandwidth)


def _kernel(pre_activations, threshold, bandwidth):
    """The rectangle kernel of area one, already divided by the bandwidth."""
    return ((pre_activations - threshold).abs() < bandwidth / 2).to(pre_activations.dtype) / bandwidth


def _sum_to(grad, threshold):
    return grad.reshape(-1, threshold.shape[-1]).sum(0).to(threshold.dtype)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, threshold = ctx.saved_tensors
        grad_threshold = -threshold * _kernel(z, threshold, ctx.bandwidth) * grad
        return grad * (z > threshold), _sum_to(grad_threshold, threshold), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, threshold = ctx.saved_tensors
        return None, _sum_to(-_kernel(z, threshold, ctx.bandwidth) * grad, threshold), None
