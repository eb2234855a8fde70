"""Which implementation computes an operation on sparse features: by device, dtype and share of active features.

CPU tensors always take the PyTorch operations of `ops/pairs.py`. CUDA tensors take the kernels of `ops/triton/` where Triton
3.6 or newer is installed, the GPU is an NVIDIA A100 or newer and the dtype is one of theirs; `HF_TRANSCODERS_KERNELS=0` in the
environment turns them off. Where so many features are active that gathering rows would take longer than dense products, they
take these.
"""

import functools
import importlib
import os
from types import ModuleType

import torch

from .pairs import PairSums
from .pairs_dense import DensePairSums


_KERNEL_DEVICES = ("cuda",)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)
# The oldest version that the kernels were compiled with.
_OLDEST_TRITON = (3, 6)
# Features per active one, below which dense products are faster: 8 B k d bytes at 5.5 TB/s from the L2 cache of an H100 take
# as long as 8 B n d operations at 70% of 989 TFLOP/s. In fp32 without tensor cores there are twice the bytes and 67 TFLOP/s.
# Derived, not measured.
_DENSE_BELOW, _DENSE_BELOW_FP32 = 128, 16


def uses_kernels(*tensors: torch.Tensor) -> bool:
    """Whether operations on these tensors are computed by the kernels of `ops/triton/`."""
    return (
        all(tensor.device.type in _KERNEL_DEVICES and tensor.dtype in _KERNEL_DTYPES for tensor in tensors)
        and os.environ.get("HF_TRANSCODERS_KERNELS", "1") != "0"
        and _has_triton()
        and all(_capable(tensor.device) for tensor in tensors)
    )


def operations(read: torch.Tensor, num_features: int, rows: int, n_pairs: int) -> type[PairSums]:
    """
    The class that computes sums over pairs: `weighted_rows`, `paired_dots`, `scatter_rows` and `scatter_values`.

    Args:
        read (`torch.Tensor`): The rows that are gathered, in the dtype that they are read in.
        num_features (`int`): Number of features of the dictionary.
        rows (`int`): Number of rows of the batch.
        n_pairs (`int`): Number of active features of the batch.
    """
    if uses_kernels(read) and prefers_dense(read.dtype, num_features, rows, n_pairs):
        return DensePairSums
    return sparse_operations(read)


def sparse_operations(read: torch.Tensor) -> type[PairSums]:
    """Same as [`operations`], whatever the share of active features."""
    if not uses_kernels(read):
        return PairSums
    return kernels("pairs_triton").TritonPairSums


def kernels(name: str) -> ModuleType:
    """A file of `ops/triton/`. Imported by name, because code that is published with a dictionary has no kernels beside it."""
    return importlib.import_module(f".triton.{name}", __package__)


def prefers_dense(dtype: torch.dtype, num_features: int, rows: int, n_pairs: int) -> bool:
    """Whether dense products on a GPU are faster than rows gathered in this dtype."""
    limit = _DENSE_BELOW if on_tensor_cores(dtype) else _DENSE_BELOW_FP32
    return num_features * rows < limit * n_pairs


def on_tensor_cores(dtype: torch.dtype) -> bool:
    """Whether products of this dtype run on tensor cores, in lower precision than fp32."""
    if dtype != torch.float32:
        return True
    # PyTorch has two settings for TF32, and refuses to read the older one after the newer one was set.
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype that products with `weight` run in: that of autocast where it is on, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def table_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype that rows of `weight` are gathered in: under autocast on a GPU a copy in low precision, half the bytes."""
    return product_dtype(weight) if uses_kernels(weight) else weight.dtype


@functools.cache
def _has_triton() -> bool:
    try:
        importlib.import_module(".triton", __package__)
        triton = importlib.import_module("triton")
    except (ImportError, TypeError):
        return False
    return tuple(int(number) for number in triton.__version__.split(".")[:2]) >= _OLDEST_TRITON


@functools.cache
def _capable(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _CAPABILITY
