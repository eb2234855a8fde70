"""Norms as linear maps."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class FrozenNorm:
    """A norm as the linear map that it is once its scale is frozen: see [`frozen_norm`].

    Args:
        scale (`torch.Tensor` of shape `(..., 1)`): One over the standard deviation, or root mean square, of each token.
        gain (`torch.Tensor` of shape `(hidden,)` or `float`): What each dimension is multiplied with.
        centred (`bool`): Whether the mean is subtracted first.
    """

    scale: torch.Tensor
    gain: torch.Tensor | float
    centred: bool

    def __call__(self, parts: torch.Tensor) -> torch.Tensor:
        """The map, of tensors that broadcast against the place where the scale was taken."""
        if self.centred:
            parts = parts - parts.mean(-1, keepdim=True)
        return parts * self.scale * self.gain

    def transpose(self, gradients: torch.Tensor) -> torch.Tensor:
        """The map's transpose: what gradients behind the norm are before it."""
        gradients = gradients * self.gain * self.scale
        return gradients - gradients.mean(-1, keepdim=True) if self.centred else gradients

    def __getitem__(self, tokens) -> "FrozenNorm":
        """The norm at some tokens: what indexing `scale` gives."""
        return FrozenNorm(self.scale[tokens], self.gain, self.centred)


def frozen_norm(norm: nn.Module, at: torch.Tensor) -> FrozenNorm:
    """A norm as the linear map that it is once its scale is frozen.

    `frozen_norm(norm, x)(x)` is `norm(x)` without the norm's bias, and the map of a sum is the sum of the maps.

    Args:
        norm (`torch.nn.Module`):
            A LayerNorm, or an RMSNorm of any family.
        at (`torch.Tensor` of shape `(..., hidden)`):
            Where the scale is taken.

    Returns:
        [`FrozenNorm`]: takes tensors that broadcast against `at`.
    """
    if isinstance(norm, nn.LayerNorm):
        scale = (at.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()
        return FrozenNorm(scale, 1.0 if norm.weight is None else norm.weight, centred=True)
    # Of a large constant an RMSNorm gives its gain, whether that is stored as such or, as in Gemma, less 1.
    gain = norm(torch.full_like(at[(0,) * (at.dim() - 1)], 1e3))
    scaled, exact = at * gain, norm(at)
    scale = (exact * scaled).sum(-1, keepdim=True) / (scaled * scaled).sum(-1, keepdim=True)
    return FrozenNorm(scale, gain, centred=False)


def norm_bias(norm: nn.Module) -> torch.Tensor | float:
    """What a norm adds to every token: its bias, or 0."""
    return norm.bias if isinstance(norm, nn.LayerNorm) and norm.bias is not None else 0.0
