"""Kernels: sparse encode and decode, exact top-k selection, straight-through steps.

Everything here works on plain tensors and knows nothing of models or language models.
"""

from .sparse import sparse_decode, sparse_encode, sparse_encode_jointly, sparse_to_dense
from .straight_through import jumprelu, step
from .topk import batch_topk, topk


__all__ = [
    "batch_topk",
    "jumprelu",
    "sparse_decode",
    "sparse_encode",
    "sparse_encode_jointly",
    "sparse_to_dense",
    "step",
    "topk",
]
