"""Normalization of each token by its own input: `normalization="token_scale"` and `"token_standardize"`."""

from typing import NamedTuple

import torch

from ..errors import TranscoderError


#: Normalizations whose scale is that of each token, and which no weights can hold.
TOKEN_NORMS = ("token_scale", "token_standardize")

# What SAELens and OpenAI's SAEs add to a standard deviation before they divide by it.
_EPSILON = 1e-5


class TokenStatistics(NamedTuple):
    """
    What normalizes a token, each `(..., 1)` in fp32.

    Args:
        mean (`torch.Tensor`): Mean over dimensions, which is subtracted; zero for `"token_scale"`.
        divisor (`torch.Tensor`): Number that the rest is divided by.
        scale (`torch.Tensor`): Number that a reconstruction is multiplied by.
    """

    mean: torch.Tensor
    divisor: torch.Tensor
    scale: torch.Tensor


def token_statistics(normalization: str, inputs: torch.Tensor) -> TokenStatistics:
    """
    The statistics of each token.

    Args:
        normalization (`str`):
            `"token_scale"` (root mean square: the norm becomes the square root of the width) or `"token_standardize"`
            (mean and standard deviation over dimensions, with n - 1; the divisor is larger by 1e-5, the scale is not, as in
            the code of arXiv 2406.04093).
        inputs (`torch.Tensor` of shape `(..., d_in)`): Activations at the input site.
    """
    inputs = inputs.float()
    if normalization == "token_scale":
        # A token of zeros stays one.
        scale = inputs.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return TokenStatistics(torch.zeros_like(scale), scale, scale)
    mean = inputs.mean(-1, keepdim=True)
    scale = inputs.std(-1, keepdim=True)
    return TokenStatistics(mean, scale + _EPSILON, scale)


def refuse_token_norm(config, what: str) -> None:
    """
    Refuses a dictionary that scales each token by itself where its maps must be the same for all tokens.

    Args:
        config ([`TranscoderConfig`]): Configuration of the dictionary.
        what (`str`): What cannot be done, as the subject of "need".
    """
    if config.normalization in TOKEN_NORMS:
        raise TranscoderError(
            f"This dictionary scales each token by itself (`normalization='{config.normalization}'`), and {what} need maps that are the "
            "same for all tokens: use a dictionary with another normalization."
        )
