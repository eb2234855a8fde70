"""Measure time and peak memory of attribution graphs at GPT-2-small's shape, and compare the adjoint with autograd.

    python benchmarks/attribution.py                            # 32 tokens, 12 x 8,192 features, 2,048 of them expanded
    python benchmarks/attribution.py --length 1024 --max-features 512
    python benchmarks/attribution.py --autograd                 # the reference on the same rows, as a ratio

A model with random weights (12 layers, width 768, 12 heads, 50,257 tokens) and TopK transcoders with random weights for
every layer, k chosen so that about 22,000 features are active. Times are medians of rounds after a warm-up; peak
memory is reported for the whole process, model and dictionaries included, and for the graph alone.
"""

import argparse
import json
import statistics
import time

import torch
from patching import in_use, peak
from transformers import GPT2Config, GPT2LMHeadModel

from hf_transcoders import TranscoderConfig, TranscoderModel
from hf_transcoders.circuits.graphs import attribution_graph


LAYERS = 12


def make(device, num_features, active, length):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().to(device)
    with torch.no_grad():
        for block in model.transformer.h:
            # As far from uniform as a trained model's attention.
            block.attn.c_attn.weight.mul_(3)
    k = round(active / (LAYERS * (length - 1)))
    transcoders = {}
    for layer in range(LAYERS):
        config = TranscoderConfig.for_model(
            model, f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch", num_features=num_features, k=k
        )
        transcoder = TranscoderModel(config).eval().to(device)
        with torch.no_grad():
            transcoder.W_dec.normal_(std=0.02)
        transcoders[f"layers.{layer}"] = transcoder
    return model, transcoders


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--num-features", type=int, default=8192)
    parser.add_argument("--active", type=int, default=22_000, help="active features in the prompt; 0: k of 64")
    parser.add_argument("--max-features", type=int, default=2048)
    parser.add_argument("--logits", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--autograd", action="store_true", help="also run the reference")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    active = args.active or 64 * LAYERS * (args.length - 1)
    model, transcoders = make(args.device, args.num_features, active, args.length)
    prompt = torch.randint(100, 50_000, (args.length,), generator=torch.Generator().manual_seed(1)).tolist()

    def graph(method="adjoint"):
        start = time.perf_counter()
        found = attribution_graph(
            model, transcoders, prompt, targets=list(range(args.logits)), max_features=args.max_features,
            method=method, progress=False,
        )  # fmt: skip
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, found

    before = in_use(args.device)
    seconds, found = graph()
    after = peak(args.device)
    times = [graph()[0] for _ in range(args.rounds)] or [seconds]
    result = {
        "device": args.device,
        "threads": torch.get_num_threads(),
        "tokens": args.length,
        "active_features": found.metadata["active_features"],
        "expanded": int((found.is_kind("feature") & found.expanded).sum()),
        "nodes": found.num_nodes,
        "edges": found.num_edges,
        "largest_row_error": found.metadata["largest_row_error"],
        "seconds": statistics.median(times),
        "peak_mib": after,
        "above_model_mib": after - before,
    }
    if args.autograd:
        in_use(args.device)
        result["autograd_seconds"], reference = graph("autograd")
        result["autograd_peak_mib"] = peak(args.device)
        result["ratio"] = result["autograd_seconds"] / result["seconds"]
        same = torch.equal(found.source, reference.source) and torch.equal(found.target, reference.target)
        largest = found.weight.abs().max()
        result["largest_difference"] = (
            (found.weight - reference.weight).abs().max().item() / largest.item() if same else None
        )
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:20}{value:,.4g}" if isinstance(value, float) else f"{name:20}{value}")


if __name__ == "__main__":
    main()
