"""Kernels: sparse encode and decode, exact top-k selection, straight-through steps.

Everything here works on plain tensors and knows nothing of models or language models.
"""

from .pairs import SharedOrder
from .sparse import (
    firing_counts,
    sparse_decode,
    sparse_decode_error,
    sparse_encode,
    sparse_encode_above,
    sparse_encode_jointly,
    sparse_encode_topk,
    sparse_to_dense,
)
from .straight_through import jumprelu, step
from .topk import batch_topk, topk


__all__ = [
    "SharedOrder",
    "batch_topk",
    "firing_counts",
    "jumprelu",
    "sparse_decode",
    "sparse_decode_error",
    "sparse_encode",
    "sparse_encode_above",
    "sparse_encode_jointly",
    "sparse_encode_topk",
    "sparse_to_dense",
    "step",
    "topk",
]
