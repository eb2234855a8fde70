"""Measure how exact attribution graphs are on a real model with a set for its layers, in fp32.

    python benchmarks/graph_exactness.py runs/every_layer
    python benchmarks/graph_exactness.py runs/every_layer --prompt "The capital of France is" --rows 200

Prints differences relative to the largest number of each kind: rows and measured pre-activations; logits of the
local replacement model (every dictionary spliced in with its error) and of the model; the adjoint and autograd;
head loadings and their edges; measured direct effects of ablations and the edges.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_transcoders import TranscoderSet, offline_model, splice
from hf_transcoders.circuits import attribution_graph, validate_edges
from hf_transcoders.circuits.graphs import head_loadings


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("transcoders", help="Hub id or folder of a set")
    parser.add_argument("--model", help="Hub id or folder; left out, SmolLM2-135M-Instruct from a package")
    parser.add_argument("--prompt", default="When Mary and John went to the store, John gave a drink to")
    parser.add_argument("--rows", type=int, default=100, help="features expanded both by the adjoint and by autograd")
    parser.add_argument("--edges", type=int, default=64)
    args = parser.parse_args()
    path = args.model or offline_model()
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    transcoders = TranscoderSet.from_pretrained(args.transcoders).eval()
    settings = {"tokenizer": tokenizer, "max_features": args.rows, "edges_per_node": 10**6, "progress": False}

    graph = attribution_graph(base, transcoders, args.prompt, **settings)
    print(
        f"{graph.num_nodes:,} nodes, {graph.num_edges:,} edges, {graph.metadata['active_features']:,} active features"
    )
    print(f"rows to pre-activations            {graph.metadata['largest_row_error']:.1e}")

    ids = torch.tensor([graph.input_ids])
    logits = base(ids).logits
    with splice(base, transcoders, error="keep", features=False):
        replaced = base(ids).logits
    print(f"logits of the replacement model    {(replaced - logits).abs().max() / logits.abs().max():.1e}")

    reference = attribution_graph(base, transcoders, args.prompt, method="autograd", **settings)
    edges = {
        pair: number for number, pair in enumerate(zip(graph.source.tolist(), graph.target.tolist(), strict=True))
    }
    largest = torch.zeros(graph.num_nodes).scatter_reduce(0, graph.target, graph.weight.abs(), "amax")
    worst, shared = 0.0, 0
    for source, target, weight in zip(
        reference.source.tolist(), reference.target.tolist(), reference.weight.tolist(), strict=True
    ):
        number = edges.get((source, target))
        if number is not None:
            shared += 1
            worst = max(worst, abs(float(graph.weight[number]) - weight) / float(largest[target]))
    print(f"adjoint to autograd                {worst:.1e}   ({shared:,} edges in both of {graph.num_edges:,})")

    loadings = head_loadings(base, transcoders, graph, max_edges=args.edges)
    sums = loadings.loadings.sum((1, 2)) + loadings.direct
    print(
        f"head loadings to their edges       {(sums - loadings.weight).abs().max() / loadings.weight.abs().max():.1e}"
    )

    found = validate_edges(base, transcoders, graph, args.edges)
    error = (found.measured["direct"] - found.predicted).abs().max() / found.predicted.abs().max()
    print(
        f"direct effects to edges            {error:.1e}   (largest difference of {len(found.predicted)})\n\n{found}"
    )


if __name__ == "__main__":
    main()
