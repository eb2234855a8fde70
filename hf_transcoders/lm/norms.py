"""Norms as linear maps."""

from collections.abc import Callable

import torch
from torch import nn


def frozen_norm(norm: nn.Module, at: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A norm as the linear map that it is once its scale is frozen.

    `frozen_norm(norm, x)(x)` is `norm(x)` without the norm's bias, and the map of a sum is the sum of the maps.

    Args:
        norm (`torch.nn.Module`):
            A LayerNorm, or an RMSNorm of any family.
        at (`torch.Tensor` of shape `(..., hidden)`):
            Where the scale is taken.

    Returns:
        `Callable`: takes tensors that broadcast against `at`.
    """
    if isinstance(norm, nn.LayerNorm):
        scale = (at.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()
        weight = 1.0 if norm.weight is None else norm.weight
        return lambda parts: (parts - parts.mean(-1, keepdim=True)) * scale * weight
    # Of a large constant an RMSNorm gives its gain, whether that is stored as such or, as in Gemma, less 1.
    gain = norm(torch.full_like(at[(0,) * (at.dim() - 1)], 1e3))
    scaled, exact = at * gain, norm(at)
    scale = (exact * scaled).sum(-1, keepdim=True) / (scaled * scaled).sum(-1, keepdim=True)
    return lambda parts: parts * gain * scale


def norm_bias(norm: nn.Module) -> torch.Tensor | float:
    """What a norm adds to every token: its bias, or 0."""
    return norm.bias if isinstance(norm, nn.LayerNorm) and norm.bias is not None else 0.0
