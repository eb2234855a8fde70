"""Inputs, tolerances and devices of the kernel tests."""

import torch


# On a GPU kernels are compiled and run there; elsewhere Triton's interpreter runs them, see tests/conftest.py.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts fp32 to bf16 where a GPU rounds, so results in bf16 may differ by one unit in the last place.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
}
DTYPES = list(TOLERANCE)


def draw(*shape, seed=0, dtype=torch.float32):
    """Normal numbers that `dtype` holds exactly."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device=DEVICE, dtype=dtype)


def draw_pairs(kind, rows, features, seed=0):
    """Offsets and indices: equal rows, ragged rows with empty ones at both ends, one feature everywhere, and nothing."""
    generator = torch.Generator().manual_seed(seed)
    counts = {
        "equal": [5] * rows,
        "ragged": [0, *torch.randint(0, 12, (rows - 2,), generator=generator).tolist(), 0],
        "shared": [2] * rows,
        "empty": [0] * rows,
    }[kind]
    chosen = [torch.randperm(features, generator=generator)[:count] for count in counts]
    if kind == "shared":
        chosen = [torch.tensor([7, 8 + row % 3]) for row in range(rows)]
    return torch.tensor([0, *counts]).cumsum(0).to(DEVICE), torch.cat(chosen).to(DEVICE)


PAIRS = ["equal", "ragged", "shared", "empty"]


def dense_of(offsets, indices, values, features):
    """The pairs as a matrix in float64."""
    dense = torch.zeros(len(offsets) - 1, features, dtype=torch.float64, device=values.device)
    rows = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=values.device), offsets.diff())
    return dense.index_put((rows, indices), values.double())
