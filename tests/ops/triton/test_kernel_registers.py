"""The kernels compile for A100 and H100 without spilled registers. No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton", reason="Triton is not installed: pip install 'hf_transcoders[kernels]'")

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "kernel_registers.py"
# Of the 255 that a thread can have; Triton 3.6 and 3.9 need different numbers.
MOST = {"tile_topk": {80: 192, 90: 168}, "above_threshold": {80: 232, 90: 192}}
MOST_OF_OTHERS = 144
# Of one block, in bytes: the smaller of the two GPUs has 163 KiB.
SHARED = 163 * 1024


def compiled(*kernels):
    pytest.importorskip("triton.backends.nvidia", reason="this Triton has no compiler for NVIDIA GPUs")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--json", *(["--only", *kernels] if kernels else [])]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def check(table):
    for row in table:
        kernel = row["kernel"].partition(",")[0]
        most = MOST[kernel][row["sm"]] if kernel in MOST else MOST_OF_OTHERS
        assert row["stack"] == 0, row
        assert row["registers"] <= most, row
        assert row["shared"] <= SHARED, row
        # Products run on the tensor cores of Hopper.
        assert row["wgmma"] == (kernel in MOST and row["sm"] == 90), row


def test_kernels_in_bf16_compile_without_spills():
    names = ["tile_topk, bf16, T 16", *(f"{kernel}, bf16" for kernel in OTHERS)]
    table = compiled(*names)
    assert [(row["kernel"], row["sm"]) for row in table] == [(name, sm) for name in names for sm in (80, 90)]
    check(table)


OTHERS = ["above_threshold", "segment_sums", "further_pieces", "decode_error", "pair_dots"]


@pytest.mark.slow
def test_all_kernels_compile_without_spills():
    table = compiled()
    assert len(table) == 2 * 3 * (3 + len(OTHERS))
    check(table)


def test_every_kernel_is_in_the_table():
    """Kernels are the functions with this end of their names in the files of `ops/triton`."""
    folder = Path(__file__).parents[3] / "hf_transcoders" / "ops" / "triton"
    kernels = {line.split()[1].partition("(")[0] for file in folder.glob("*.py") for line in file.read_text().splitlines()
               if line.startswith("def ") and "_kernel(" in line}  # fmt: skip
    assert {f"{name}_kernel" for name in ["tile_topk", *OTHERS]} == kernels
