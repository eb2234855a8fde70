"""Triton kernels for NVIDIA GPUs, one file each with its launcher. Only `ops/dispatch.py` decides where they run.

Importing a file of this package imports Triton. With `TRITON_INTERPRET=1` in the environment before that, kernels run on CPU
tensors in Triton's interpreter, which is how they are tested without a GPU.
"""
