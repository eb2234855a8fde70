"""Norms as linear maps."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType

import torch
from torch import nn

from .devices import module_device
from .linear_maps import acting_module, loaded


@dataclass(frozen=True)
class NormGain:
    """The linear map of a norm without its scale at a token and without its bias.

    Args:
        gain (`torch.Tensor` of shape `(hidden,)`): Factor on each dimension.
        centers (`bool`): Whether the mean is subtracted first, as LayerNorm does.
    """

    gain: torch.Tensor
    centers: bool

    def push(self, rows: torch.Tensor) -> torch.Tensor:
        """Directions before the norm, `(..., hidden)`, mapped to directions after it."""
        return _centered(rows, self.centers) * self.gain.to(rows)

    def pull(self, rows: torch.Tensor) -> torch.Tensor:
        """Read vectors after the norm, `(..., hidden)`, mapped to read vectors before it: `push(x) @ f = x @ pull(f)`."""
        return _centered(rows * self.gain.to(rows), self.centers)


def norm_gain(norm: nn.Module, width: int) -> NormGain:
    """The [`NormGain`] of a norm over `width` dimensions: a LayerNorm, or an RMSNorm of any family.

    All but a plain LayerNorm is probed rather than read, so that `1 + w` and other parametrizations need no special case.
    """
    norm = acting_module(norm)
    # In fp32: a model in bf16 has its gains exactly, and their sum with a one is not rounded.
    ones = torch.ones(width, device=module_device(norm))
    if type(norm) is nn.LayerNorm:
        with loaded(norm):
            return NormGain(ones if norm.weight is None else norm.weight, centers=True)
    # Both kinds of norm leave +1, -1, +1 ... at its scale; only one that subtracts the mean maps a constant to its bias.
    signs = _signs(ones)
    # Large, so that the epsilon does not count.
    run = _in_full_precision(norm)
    up, down, high, low = (run(1e3 * at) for at in (signs, -signs, ones, -ones))
    gain = signs * (up - down) / 2
    centers = (high - low).abs().max() < 1e-3 * gain.abs().max()
    return NormGain(gain, bool(centers))


def norm_scale(norm: nn.Module, at: torch.Tensor) -> torch.Tensor:
    """The scale of a norm at `at (..., hidden)`, shape `(..., 1)`: `norm(at)` is its [`NormGain`] times this, and a bias."""
    norm = acting_module(norm)
    if isinstance(norm, nn.LayerNorm):
        return (at.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()
    scaled, exact = norm_gain(norm, at.shape[-1]).push(at), norm(at).to(at.dtype)
    if isinstance(bias := norm_bias(norm), torch.Tensor):
        exact = exact - bias.to(exact)
    return (exact * scaled).sum(-1, keepdim=True) / (scaled * scaled).sum(-1, keepdim=True)


@dataclass(frozen=True)
class FrozenNorm:
    """The linear map of a norm at a frozen scale: see [`frozen_norm`].

    Args:
        scale (`torch.Tensor` of shape `(..., 1)`): Scale of each token.
        gain ([`NormGain`]): The map without its scale.
    """

    scale: torch.Tensor
    gain: NormGain

    def __call__(self, parts: torch.Tensor) -> torch.Tensor:
        """The map, of tensors that broadcast against the place where the scale was taken."""
        return self.gain.push(parts) * self.scale

    def transpose(self, gradients: torch.Tensor) -> torch.Tensor:
        """The transpose of the map, from gradients after the norm to gradients before it."""
        return self.gain.pull(gradients * self.scale)

    def __getitem__(self, tokens) -> "FrozenNorm":
        """The norm at some tokens, with `scale` indexed in the same way."""
        return FrozenNorm(self.scale[tokens], self.gain)


def frozen_norm(norm: nn.Module, at: torch.Tensor) -> FrozenNorm:
    """The linear map of a norm at a frozen scale.

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


def norm_width(norm: nn.Module) -> int:
    """Width of a norm, from its parameters."""
    return next(parameter.shape[-1] for parameter in norm.parameters())


def norm_bias(norm: nn.Module) -> torch.Tensor | float:
    """Bias of a norm, or 0 if it has none."""
    norm = acting_module(norm)
    if "bias" in norm._parameters:
        with loaded(norm):
            return 0.0 if norm.bias is None else norm.bias
    if not any(name.endswith("bias") for name, _ in norm.named_parameters()):
        return 0.0
    signs = _signs(torch.ones(norm_width(norm), device=module_device(norm)))
    return (norm(1e3 * signs) + norm(-1e3 * signs)) / 2


def _signs(ones):
    signs = ones.clone()
    signs[1::2] = -1
    return signs


def _in_full_precision(norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The norm as a function with fp32 copies of its weights, without hooks; the module itself stays as it is."""
    plain = copy.copy(norm)
    with loaded(norm):
        # A weight is replaced in the copy alone: other threads may run the norm meanwhile.
        plain._parameters = {
            name: weight if weight is None else nn.Parameter(weight.detach().float(), requires_grad=False)
            for name, weight in norm._parameters.items()
        }
    forward = vars(norm).get("_old_forward", vars(norm).get("forward"))
    function = forward.__func__ if isinstance(forward, MethodType) else type(norm).forward
    return lambda rows: function(plain, rows)


def _centered(rows, centers):
    return rows - rows.mean(-1, keepdim=True) if centers else rows
