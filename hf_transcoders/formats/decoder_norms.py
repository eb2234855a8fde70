"""Move the norms of decoder rows into the encoder, for libraries whose features are scaled by them."""

import functools
from collections.abc import Callable

import torch

from .tensor_files import LazyTensor


def decoder_norms(decoder: LazyTensor, dtype: torch.dtype = torch.float64) -> Callable[[], torch.Tensor]:
    """The norms `(n,)` of the decoder rows of features, of all sites together; read when they are asked for, and once."""
    return functools.cache(lambda: decoder.read().to(dtype).flatten(1).norm(dim=-1))


def norms_into_encoder(tensors: dict[str, LazyTensor], norms: Callable[[], torch.Tensor]) -> None:
    """
    Multiplies encoder rows and biases by norms and divides decoder rows by them: features become the products, and the
    reconstruction stays.

    Args:
        tensors (`dict[str, LazyTensor]`): `W_enc`, `b_enc` and `W_dec`, which are replaced.
        norms (`Callable`): Gives the norms `(n,)`, in the type to compute in.
    """

    def shaped(rows):
        its = norms()
        return rows.to(its.dtype), its.view(-1, *(1,) * (rows.dim() - 1))

    for name in ("W_enc", "b_enc"):
        tensors[name] = tensors[name].then(lambda rows: torch.mul(*shaped(rows)))
    tensors["W_dec"] = tensors["W_dec"].then(lambda rows: torch.div(*shaped(rows)))
