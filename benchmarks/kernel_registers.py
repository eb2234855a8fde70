"""Compile the GPU kernels ahead of time for NVIDIA A100 (sm_80) and H100 (sm_90), and print what each needs. No GPU is needed.

    python benchmarks/kernel_registers.py
    python benchmarks/kernel_registers.py --json

Columns: registers of a thread, bytes of its stack (registers that did not fit are spilled there), shared memory of a block,
and whether the product runs on Hopper's own instructions (wgmma). Sizes of blocks are those of the launchers, and pointers are
aligned to 16 bytes, as those of tensors are. Tensors are those of d 2,304; the width changes no figure.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


# With the interpreter there would be nothing to compile.
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hf_transcoders.ops.triton import (  # noqa: E402
    above_threshold,
    decode_error,
    pair_dots,
    segment_sums,
    tile_topk,
)
from hf_transcoders.ops.triton.launching import COMPILER_OPTIONS, gathered_block  # noqa: E402


WIDTH = 2304
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def variants():
    """Name -> kernel, types of its arguments, constants and launch options."""
    found = {}
    for dtype, name in TYPES.items():
        product = {
            "COLUMNS": tile_topk.COLUMNS, "EVEN": True, "PRECISION": "tf32", "UPCAST": False,
            **tile_topk.launch_settings(dtype),
        }  # fmt: skip
        sizes = {"rows": "i32", "features": "i32", "width": "i32", "tiles": "i32"}
        encoder = {"inputs": f"*{name}", "weight": f"*{name}", "bias": "*fp32"}
        for kept in (4, 8, 16):
            constants = {"KEPT": kept, "WIDE": dtype == torch.float32, **product}
            types = {**encoder, "keys": "*i64", **sizes}
            found[f"tile_topk, {name}, T {kept}"] = tile_topk.tile_topk_kernel, types, constants
        outputs = {"threshold": "*fp32", "found": "*i32", "counts": "*i32"}
        constants = {"CAPACITY": above_threshold.CAPACITY, **product}
        found[f"above_threshold, {name}"] = (
            above_threshold.above_threshold_kernel, {**encoder, **outputs, **sizes}, constants,
        )  # fmt: skip
        gathered = gathered_block(WIDTH, segment_sums.PAIRS_AT_A_TIME)
        pieces = {"PIECE": segment_sums.PIECE, **gathered}
        offsets = {"offsets": "*i64", "piece_offsets": "*i64"}
        pairs = {"sources": "*i64", "values": "*fp32", "table": f"*{name}", "partial": "*fp32"}
        found[f"segment_sums, {name}"] = (
            segment_sums.segment_sums_kernel, {**offsets, **pairs, "out": "*fp32", "width": "i32"}, pieces,
        )  # fmt: skip
        found[f"further_pieces, {name}"] = (
            segment_sums.further_pieces_kernel,
            {"offsets": "*i64", "owners": "*i64", "piece_offsets": "*i64", **pairs, "segments": "i32", "width": "i32"},
            pieces,
        )
        found[f"decode_error, {name}"] = (
            decode_error.decode_error_kernel,
            {
                "offsets": "*i64", "indices": "*i64", "values": "*fp32", "table": f"*{name}", "start": "*fp32",
                "start_stride": "i32", "targets": "*fp32", "out": "*fp32", "residual": f"*{name}", "squared": "*fp32",
                "width": "i32",
            },
            gathered,
        )  # fmt: skip
        found[f"pair_dots, {name}"] = (
            pair_dots.pair_dots_kernel,
            {
                "row_numbers": "*i64", "indices": "*i64", "rows": f"*{name}", "table": f"*{name}", "out": "*fp32",
                "n_pairs": "i32", "width": "i32",
            },
            gathered_block(WIDTH, pair_dots.PAIRS_AT_A_TIME),
        )  # fmt: skip
    return found


def compile_kernel(kernel, types, constants, capability):
    """The compiled kernel for a GPU of this compute capability."""
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name == "width"]
    source = ASTSource(
        fn=kernel,
        signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**options, **COMPILER_OPTIONS})


def resources(compiled):
    """Registers and bytes of stack of a thread, read from the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))


def measure(names=None):
    table = []
    for name, (kernel, types, constants) in variants().items():
        if names is not None and name not in names:
            continue
        for capability in (80, 90):
            compiled = compile_kernel(kernel, types, constants, capability)
            registers, stack = resources(compiled)
            table.append(
                {
                    "kernel": name, "sm": capability, "warps": constants.get("num_warps", 4), "registers": registers,
                    "stack": stack, "shared": compiled.metadata.shared, "wgmma": "wgmma" in compiled.asm["ptx"],
                }
            )  # fmt: skip
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="KERNEL", help="rows of the table, such as 'pair_dots, bf16'")
    args = parser.parse_args()
    table = measure(args.only)
    if args.json:
        json.dump(table, sys.stdout, indent=2)
        return
    print(f"Triton {triton.__version__}\n")
    print("| kernel | warps | registers, sm_80 / sm_90 | stack, bytes | shared memory, KiB | wgmma on sm_90 |")
    print("|---|---|---|---|---|---|")
    for old, new in zip(table[::2], table[1::2], strict=True):
        print(
            f"| {old['kernel']} | {old['warps']} | {old['registers']} / {new['registers']} | {old['stack']} / {new['stack']} | "
            f"{old['shared'] / 1024:.0f} / {new['shared'] / 1024:.0f} | {'yes' if new['wgmma'] else ''} |"
        )


if __name__ == "__main__":
    main()
