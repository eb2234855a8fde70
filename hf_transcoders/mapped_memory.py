"""Memory that is mapped from files."""

import ctypes
import mmap
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


def release_pages(mapped: "torch.Tensor") -> None:
    """
    Takes the pages of a tensor that is mapped from a file out of memory, after it was copied: otherwise copy and file are both
    there while others load. The tensor can still be read.

    Args:
        mapped (`torch.Tensor`): Unchanged tensor, mapped from a file. One in other memory would be destroyed.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        # Only advice: if it is not taken, memory is what it was.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
