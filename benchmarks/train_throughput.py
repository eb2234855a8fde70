"""Measure training speed: language model forward pass, dictionary step, and both, compared with a plain dense PyTorch step.

    python benchmarks/train_throughput.py                 # CPU, or CUDA where there is one
    python benchmarks/train_throughput.py --k 64 --json

All rows are measured in one process, in turn, several rounds; a row's figure is the median round, and ratios are between
medians. The dense step is what one writes without a library: `relu(x @ W + b)`, `torch.topk`, scatter, `f @ W_dec`, mean
squared error, backward, clip, fused Adam. The library's step does the same and in addition keeps its running metrics.
Peak memory is measured in a separate process for each row, above the memory of the imported libraries.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from hf_transcoders import TranscoderConfig, TranscoderModel, capture
from hf_transcoders.training.monitor import DictionaryMonitor


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def make_dense_step(args, device):
    generator = torch.Generator().manual_seed(0)
    d, n = args.width, args.num_features
    parameters = [
        torch.nn.Parameter(tensor.to(device))
        for tensor in (
            torch.randn(n, d, generator=generator) / d**0.5, torch.zeros(n), torch.zeros(n, d), torch.zeros(d),
        )
    ]  # fmt: skip
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    W_enc, b_enc, W_dec, b_dec = parameters

    def step(x, y):
        features = F.relu(F.linear(x, W_enc, b_enc))
        values, indices = features.topk(args.k, dim=-1)
        sparse = torch.zeros_like(features).scatter(1, indices, values)
        loss = F.mse_loss(sparse @ W_dec + b_dec, y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def make_library_step(args, device, autocast=None):
    torch.manual_seed(0)
    model = TranscoderModel(TranscoderConfig(d_in=args.width, num_features=args.num_features, k=args.k)).to(device)
    monitor = DictionaryMonitor(model, 10_000_000)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step(x, y):
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            output = model(x, y, output_features=False)
        monitor.update(y, output)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def make_forward(args, device):
    """Forward pass of a language model of SmolLM2-135M's shape with random weights, stopped after layer 8's MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = (
        LlamaForCausalLM(config).to(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32).eval()
    )
    ids = torch.randint(config.vocab_size, (args.batch // 128, 128), device=device)
    sites = ["layers.8.mlp.in", "layers.8.mlp.branch"]

    def forward(stop=True):
        with torch.no_grad(), capture(model, sites, stop=stop) as activations:
            model(ids)
        return [activations[site].reshape(-1, 576).float() for site in sites]

    return forward


def rows(args, device):
    """Name -> function of one batch."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(args.batch, args.width, generator=generator).to(device) for _ in range(2))
    dense, library = make_dense_step(args, device), make_library_step(args, device)
    mixed = make_library_step(args, device, torch.bfloat16)
    forward, trained = make_forward(args, device), make_library_step(args, device)
    return {
        "dense PyTorch step, fp32": lambda: dense(x, y),
        "library step, fp32": lambda: library(x, y),
        "library step, bf16 autocast": lambda: mixed(x, y),
        "LM forward, whole": lambda: forward(stop=False),
        "LM forward, stopped at layer 8": forward,
        "LM forward + library step": lambda: trained(*forward()),
    }


def measure(args, device):
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    functions = rows(args, device)
    times = {name: [] for name in functions}
    for round_ in range(args.rounds + 1):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if round_:  # The first round warms up.
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(args, device, name) -> float:
    """Peak GiB of one row, in its own process."""
    command = [sys.executable, __file__, "--row", name, "--device", device]
    for option in ("batch", "width", "num_features", "k"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def resident_memory(field) -> float:
    """GiB of this process now (`VmRSS`) or at its peak (`VmHWM`); Linux keeps both apart from the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 2**20
    raise SystemExit("this system does not tell a process's peak memory")


def run_row(args, device):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(args.batch, args.width, generator=generator).to(device) for _ in range(2))
    before = resident_memory("VmRSS")
    forward = make_forward(args, device) if "LM" in args.row else None
    if "dense" in args.row:
        step = make_dense_step(args, device)
    elif "library" in args.row:
        step = make_library_step(args, device, torch.bfloat16 if "bf16" in args.row else None)
    else:
        step = None
    for _ in range(3):
        batch = forward(stop="whole" not in args.row) if forward else (x, y)
        if step:
            step(*batch)
    if device == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**30)
    else:
        print(resident_memory("VmHWM") - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--num-features", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        run_row(args, args.device)
        return
    times = measure(args, args.device)
    dense = times["dense PyTorch step, fp32"]
    table = {
        name: {
            "tokens/s": args.batch / seconds,
            "ms": seconds * 1e3,
            "against dense": dense / seconds,
            "peak GiB": peak_memory(args, args.device, name),
        }
        for name, seconds in times.items()
    }
    if args.json:
        print(json.dumps(table, indent=2))
        return
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}, torch {torch.__version__}; d {args.width}, {args.num_features} features, k {args.k}, batch {args.batch}"
    )
    print(f"{'':34}{'tokens/s':>10}{'ms':>9}{'vs dense':>10}{'peak GiB':>10}")
    for name, row in table.items():
        ratio = f"{row['against dense']:.2f}x" if "step" in name and "LM" not in name else ""
        print(f"{name:34}{row['tokens/s']:>10,.0f}{row['ms']:>9.1f}{ratio:>10}{row['peak GiB']:>10.2f}")


if __name__ == "__main__":
    main()
