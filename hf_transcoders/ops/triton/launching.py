"""What every launcher needs: the mode that kernels run in, and sizes of grids."""

import contextlib
import os

import torch
import triton


# The interpreter multiplies the bit patterns of bf16 numbers, so kernels convert them to fp32 there.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton 3.10 changes the default; a fixed choice gives the same bits with both.
COMPILER_OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": True}


def tiles_of(size: int, tile: int) -> int:
    """Number of tiles that cover `size`."""
    return triton.cdiv(size, tile)


def gathered_block(width: int, pairs: int) -> dict[str, int]:
    """Pairs and columns of a table that a program reads at a time, and its warps."""
    return {"PAIRS": pairs, "WIDTH": min(256, max(16, triton.next_power_of_2(width))), "num_warps": 4}


def on_device_of(tensor: torch.Tensor):
    """A context in which kernels run on the device of `tensor`; Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
