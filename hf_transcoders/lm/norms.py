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


def fold_norm(norm: nn.Module, weight: torch.Tensor, after: bool = False) -> torch.Tensor:
    """Weights with the gain of a norm, and the centring of a LayerNorm, folded in; its scale is left out.

    Args:
        norm (`torch.nn.Module`): A LayerNorm, or an RMSNorm of any family.
        weight (`torch.Tensor` of shape `(..., hidden)`): Rows that read what the norm gives.
        after (`bool`, *optional*, defaults to `False`): Whether the rows are written into the norm instead.

    Returns:
        `torch.Tensor`: of the shape of `weight`.
    """
    # Of a large constant an RMSNorm gives its gain, whether that is stored as such or, as in Gemma, less 1.
    centres = isinstance(norm, nn.LayerNorm)
    gain = norm.weight if centres else norm(weight.new_full(weight.shape[-1:], 1e3))
    if centres and after:
        weight = weight - weight.mean(-1, keepdim=True)
    weight = weight if gain is None else weight * gain
    return weight - weight.mean(-1, keepdim=True) if centres and not after else weight


def norm_bias(norm: nn.Module) -> torch.Tensor | float:
    """What a norm adds to every token: its bias, or 0."""
    return norm.bias if isinstance(norm, nn.LayerNorm) and norm.bias is not None else 0.0
