"""Measure training steps of one TopK transcoder on a GPU, at sizes where kernels decide: kernels, PyTorch operations, a dense
step, and sparsify where it is installed.

    python benchmarks/gpu_kernels.py                             # every size; an H100 or H200 is what targets are for
    python benchmarks/gpu_kernels.py --sizes 768,24576,4096,32   # width, features, batch, k
    python benchmarks/gpu_kernels.py --parts                     # what the selection of features alone takes
    python benchmarks/gpu_kernels.py --device cpu --sizes 64,512,64,4 --rounds 2    # does it run? The figures mean nothing

All rows of a size are measured in one process, in turn, several rounds; a row's figure is the median round. All steps run
under bf16 autocast with fp32 weights, end with a fused Adam step, and get the same random inputs. "GiB" is the peak of the
step above what weights, gradients and optimizer keep.

The target is a bound, not a measurement: 2 B d n operations of the encoder at 55% of 989 TFLOP/s, 8 B k d bytes of gathered
rows at 60% of 5.5 TB/s (the L2 cache), and 60 d n bytes of Adam at 85% of 3.35 TB/s.
"""

import argparse
import functools
import importlib
import os
import statistics
import time

import torch
import torch.nn.functional as F

from hf_transcoders import TranscoderConfig, TranscoderModel
from hf_transcoders.ops import dispatch, sparse_encode_topk


SIZES = [
    (768, 24576, 4096, 32),
    (768, 24576, 16384, 32),
    (768, 24576, 16384, 64),
    (768, 131072, 8192, 64),
    (2304, 24576, 8192, 64),
    (2304, 24576, 16384, 128),
    (2304, 131072, 8192, 64),
    (4096, 24576, 8192, 64),
    (4096, 131072, 4096, 64),
    (4096, 131072, 16384, 128),
]


def target_ms(width, features, batch, k):
    """The bound in the head of this file, in milliseconds."""
    encoder = 2 * batch * width * features / (0.55 * 989e12)
    gathered = 8 * batch * k * width / (0.6 * 5.5e12)
    adam = 60 * width * features / (0.85 * 3.35e12)
    return 1e3 * (encoder + gathered + adam)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-4, fused=True)


def library_step(size, device, kernels):
    width, features, _, k = size
    torch.manual_seed(0)
    model = TranscoderModel(TranscoderConfig(d_in=width, d_out=width, num_features=features, k=k)).to(device)
    optimizer = adam(model.parameters())

    def step(inputs, targets):
        os.environ["HF_TRANSCODERS_KERNELS"] = "1" if kernels else "0"
        with torch.autocast(device, torch.bfloat16):
            loss = model(inputs, targets, output_features=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def dense_step(size, device):
    width, features, _, k = size
    torch.manual_seed(0)
    shapes = (features, width), (features,), (features, width), (width,)
    W_enc, b_enc, W_dec, b_dec = weights = [
        torch.nn.Parameter(torch.randn(shape, device=device) / width**0.5) for shape in shapes
    ]
    optimizer = adam(weights)

    def step(inputs, targets):
        with torch.autocast(device, torch.bfloat16):
            scores = F.relu(F.linear(inputs, W_enc, b_enc))
            values, indices = scores.topk(k, dim=-1)
            loss = F.mse_loss((torch.zeros_like(scores).scatter(1, indices, values) @ W_dec + b_dec).float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def sparsify_step(size, device):
    # Not a requirement of this repository, so not imported by name.
    sparsify = importlib.import_module("sparsify")
    width, features, _, k = size
    torch.manual_seed(0)
    coder = sparsify.SparseCoder(
        width, sparsify.SparseCoderConfig(num_latents=features, k=k, transcode=True), device=device
    )
    optimizer = adam(coder.parameters())

    def step(inputs, targets):
        with torch.autocast(device, torch.bfloat16):
            loss = coder(inputs, targets).fvu
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def has_sparsify():
    try:
        importlib.import_module("sparsify")
    except ImportError:
        return False
    return True


def seconds(function, device):
    if device != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(functions, device, rounds):
    """Median seconds and peak GiB of each function, in turn; the first two rounds warm up."""
    times, peaks = {name: [] for name in functions}, dict.fromkeys(functions, 0.0)
    for round_ in range(rounds + 2):
        for name, function in functions.items():
            if device == "cuda":
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            taken = seconds(function, device)
            if round_ >= 2:
                times[name].append(taken)
                if device == "cuda":
                    peaks[name] = max(peaks[name], (torch.cuda.max_memory_allocated() - before) / 2**30)
    return {name: (statistics.median(times[name]), peaks[name]) for name in functions}


def steps_of(size, device):
    steps = {
        "kernels": library_step(size, device, kernels=True),
        "PyTorch operations": library_step(size, device, kernels=False),
        "dense": dense_step(size, device),
    }
    return {**steps, "sparsify": sparsify_step(size, device)} if has_sparsify() else steps


def parts_of(size, device):
    """Selection of features alone, without gradients."""
    width, features, batch, k = size
    torch.manual_seed(0)
    inputs = torch.randn(batch, width, device=device)
    weight, bias = torch.randn(features, width, device=device), torch.randn(features, device=device)

    def select(kernels):
        os.environ["HF_TRANSCODERS_KERNELS"] = "1" if kernels else "0"
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            sparse_encode_topk(inputs, weight, bias, k)

    def product():
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            return F.linear(inputs, weight, bias)

    return {
        "select, kernels": lambda: select(True),
        "select, PyTorch operations": lambda: select(False),
        "product alone": product,
        "product and torch.topk": lambda: product().topk(k, dim=-1, sorted=False),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=lambda text: tuple(map(int, text.split(","))), default=SIZES)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--parts", action="store_true", help="measure the selection of features instead of steps")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here; `--device cpu` with a small size shows whether this script runs.")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    in_use = dispatch.uses_kernels(torch.zeros(1, device=args.device))
    print(f"{name}, torch {torch.__version__}, kernels {'in use' if in_use else 'NOT in use'}\n")
    print(
        "| d | features | batch | k | row | ms | tokens/s | GiB | target, ms |\n|---|---|---|---|---|---|---|---|---|"
    )
    for size in args.sizes:
        width, _, batch, _ = size
        torch.manual_seed(1)
        inputs, targets = (torch.randn(batch, width, device=args.device) for _ in range(2))
        if args.parts:
            functions = parts_of(size, args.device)
        else:
            steps = steps_of(size, args.device)
            functions = {row: functools.partial(step, inputs, targets) for row, step in steps.items()}
        for row, (taken, peak) in measure(functions, args.device, args.rounds).items():
            target = "" if args.parts else f"{target_ms(*size):.1f}"
            cells = *size, row, f"{taken * 1e3:.2f}", f"{batch / taken:,.0f}", f"{peak:.2f}", target
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
