"""How far a row of a graph may be from what it sums to: rounding, derived from the arithmetic."""

import math

import torch


# A sum of n roundings is off by more than this many times sqrt(n) units with a probability below 2 exp(-18) = 3e-8, if
# they are independent with mean zero (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis").
_DEVIATIONS = 6


def row_tolerance(mass: torch.Tensor, layer: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Largest difference between rows and their totals that rounding explains.

    A total is read off the residual stream, into which every layer before has written twice, with a rounding to the
    model's dtype each time; the products over the width of the stream are accumulated in fp32. Both are relative to the
    absolute values that are added up, not to their sum, in which large terms may cancel.

    Args:
        mass (`torch.Tensor` of shape `(rows,)`):
            Sum of the absolute contributions of a row and of the absolute terms of the product that reads its total.
        layer (`torch.LongTensor` of shape `(rows,)`):
            Layer in which the total is read.
        width (`int`):
            Width of what is read.
        dtype (`torch.dtype`):
            Dtype of the model.

    Returns:
        `torch.Tensor` of shape `(rows,)` in fp64.
    """
    # The unit of rounding is half the distance between neighbours. Embedding and norm round once more each.
    stream = (2 * layer.double() + 2).sqrt() * torch.finfo(dtype).eps / 2
    products = math.sqrt(width) * torch.finfo(torch.float32).eps / 2
    return _DEVIATIONS * (stream + products) * mass.double()
