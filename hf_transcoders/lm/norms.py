"""Norms as linear maps."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call


@dataclass(frozen=True)
class NormGain:
    """What a norm does to a direction, up to the scale that it has at a token and without its bias.

    Args:
        gain (`torch.Tensor` of shape `(hidden,)`): Factor on each dimension.
        centres (`bool`): Whether the mean is subtracted first, as LayerNorm does.
    """

    gain: torch.Tensor
    centres: bool

    def push(self, rows: torch.Tensor) -> torch.Tensor:
        """What directions before the norm, `(..., hidden)`, are behind it."""
        return _centred(rows, self.centres) * self.gain.to(rows)

    def pull(self, rows: torch.Tensor) -> torch.Tensor:
        """What readers behind the norm, `(..., hidden)`, read before it: `push(x) @ f = x @ pull(f)`."""
        return _centred(rows * self.gain.to(rows), self.centres)


def norm_gain(norm: nn.Module, width: int) -> NormGain:
    """The [`NormGain`] of a norm over `width` dimensions: a LayerNorm, or an RMSNorm of any family.

    All but a plain LayerNorm is probed rather than read, so that `1 + w` and other parametrisations need no special case.
    """
    # In fp32: a model in bf16 has its gains exactly, and their sum with a one is not rounded.
    ones = torch.ones(width, device=next(norm.parameters(), torch.empty(0)).device)
    if type(norm) is nn.LayerNorm:
        return NormGain(ones if norm.weight is None else norm.weight, centres=True)
    # Both kinds of norm leave +1, -1, +1 ... at its scale; only one that subtracts the mean maps a constant to its bias.
    signs = ones.clone()
    signs[1::2] = -1
    # Large, so that the epsilon does not count.
    weights = {name: weight.float() for name, weight in norm.named_parameters()}
    up, down, high, low = (functional_call(norm, weights, 1e3 * at) for at in (signs, -signs, ones, -ones))
    gain = signs * (up - down) / 2
    centres = (high - low).abs().max() < 1e-3 * gain.abs().max()
    return NormGain(gain, bool(centres))


def norm_scale(norm: nn.Module, at: torch.Tensor) -> torch.Tensor:
    """The scale of a norm at `at (..., hidden)`, shape `(..., 1)`: `norm(at)` is its [`NormGain`] times this, and a bias."""
    if isinstance(norm, nn.LayerNorm):
        return (at.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()
    scaled, exact = norm_gain(norm, at.shape[-1]).push(at), norm(at) - norm_bias(norm)
    return (exact * scaled).sum(-1, keepdim=True) / (scaled * scaled).sum(-1, keepdim=True)


@dataclass(frozen=True)
class FrozenNorm:
    """A norm as the linear map that it is once its scale is frozen: see [`frozen_norm`].

    Args:
        scale (`torch.Tensor` of shape `(..., 1)`): What each token is multiplied with.
        gain ([`NormGain`]): What happens to directions besides.
    """

    scale: torch.Tensor
    gain: NormGain

    def __call__(self, parts: torch.Tensor) -> torch.Tensor:
        """The map, of tensors that broadcast against the place where the scale was taken."""
        return self.gain.push(parts) * self.scale

    def transpose(self, gradients: torch.Tensor) -> torch.Tensor:
        """The map's transpose: what gradients behind the norm are before it."""
        return self.gain.pull(gradients * self.scale)

    def __getitem__(self, tokens) -> "FrozenNorm":
        """The norm at some tokens: what indexing `scale` gives."""
        return FrozenNorm(self.scale[tokens], self.gain)


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
    return FrozenNorm(norm_scale(norm, at), norm_gain(norm, at.shape[-1]))


def norm_bias(norm: nn.Module) -> torch.Tensor | float:
    """What a norm adds to every token: its bias, or 0."""
    bias = getattr(norm, "bias", None)
    return bias if isinstance(bias, torch.Tensor) else 0.0


def _centred(rows, centres):
    return rows - rows.mean(-1, keepdim=True) if centres else rows
