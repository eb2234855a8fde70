"""Largest distance of a row from its total that rounding explains."""

import math

import torch


# A sum of n roundings is off by more than this many times sqrt(n) units with a probability below 2 exp(-18) = 3e-8, if
# they are independent with mean zero (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis").
_DEVIATIONS = 6


def row_tolerance(mass: torch.Tensor, layer: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Largest difference between rows and their totals that rounding explains.

    A total is read from the residual stream, to which every earlier layer has written twice, with a rounding to the model's
    dtype each time; the products over the width of the stream are accumulated in fp32. Both roundings are relative to the
    magnitudes of the terms, not to their sum, in which large terms may cancel.

    Args:
        mass (`torch.Tensor` of shape `(rows,)`):
            Magnitudes of the contributions of a row and of the terms of the product that reads its total, summed.
        layer (`torch.LongTensor` of shape `(rows,)`):
            Layer at which the total is read.
        width (`int`):
            Width of the stream.
        dtype (`torch.dtype`):
            Precision of the model.

    Returns:
        `torch.Tensor` of shape `(rows,)` in fp64.
    """
    # The unit of rounding is half the distance between neighboring numbers. The embedding and the norm each add one.
    stream = (2 * layer.double() + 2).sqrt() * torch.finfo(dtype).eps / 2
    products = math.sqrt(width) * torch.finfo(torch.float32).eps / 2
    return _DEVIATIONS * (stream + products) * mass.double()
