# /// script
# dependencies = ["hf_transcoders[gguf,plots]"]
# ///
"""
Build the attribution graph of a prompt, show its strongest features, and check whether ablating them has the effect that the
graph predicts.

    python examples/scripts/train_every_layer.py --output-dir runs/every_layer       # first: transcoders for every layer
    python examples/scripts/attribution_graph.py runs/every_layer
    python examples/scripts/attribution_graph.py me/my-transcoders --prompt "The capital of France is" --targets " Paris" " London"
"""

import argparse
from pathlib import Path

import torch

from hf_transcoders import TranscoderSet, load_language_model
from hf_transcoders.circuits import FeatureEdit, FeatureWeights, attribution_graph, measure_effect, validate_edges
from hf_transcoders.circuits.graphs import head_loadings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("transcoders", help="Hub id or folder of a set")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="Hub id, folder, or name of a packaged model")
    parser.add_argument("--prompt", default="The keys to the cabinet")
    parser.add_argument("--targets", nargs=2, default=[" are", " is"], help="the difference of these logits")
    parser.add_argument("--max-features", type=int, default=2048)
    parser.add_argument(
        "--features", type=int, default=8, help="how many of the strongest features to show and ablate"
    )
    parser.add_argument("--output-dir", default="runs/graph")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_language_model(args.model, dtype=torch.float32)
    base = base.to(device).eval()
    transcoders = TranscoderSet.from_pretrained(args.transcoders).to(device)

    graph = attribution_graph(
        base,
        transcoders,
        args.prompt,
        tokenizer=tokenizer,
        targets=[tuple(args.targets)],
        max_features=args.max_features,
    )
    target = graph.num_nodes - 1
    print(f"{args.prompt!r}: {graph.label(target)} = {graph.total[target]:+.3f}")
    print(
        f"{graph.num_nodes:,} nodes, {graph.num_edges:,} edges, {graph.metadata['active_features']:,} active features"
    )
    print(f"rows sum to {graph.metadata['largest_row_error']:.0e}; " + _scores(graph.scores()))

    weights = FeatureWeights(base, transcoders)
    is_feature = graph.is_kind("feature")
    into = [(source, weight) for source, weight in graph.incoming(target) if is_feature[source]]
    strongest = [source for source, weight in into if weight > 0][: args.features]
    print("\nfeatures that push it up most, and the tokens whose logits they raise and lower:")
    for source in strongest:
        node = graph.node(source)
        raised, lowered = _tokens(weights.logits(node.dictionary, [node.feature], k=5), tokenizer)
        weight = next(weight for other, weight in into if other == source)
        print(f"  {weight:+.3f}  {graph.label(source):38} +{raised} -{lowered}")

    edges = [
        int(edge) for source in strongest for edge in ((graph.source == source) & (graph.target == target)).nonzero()
    ]
    print(f"\nheads that carry them:\n{head_loadings(base, transcoders, graph, edges).to_text(6)}")

    # Weak features of the same layers and tokens, as a control.
    places = {(graph.node(source).dictionary, graph.node(source).position) for source in strongest}
    weak = [
        source
        for source, _ in reversed(into)
        if (graph.node(source).dictionary, graph.node(source).position) in places and source not in strongest
    ][: args.features]
    ids = torch.tensor([graph.input_ids])
    edits = [[_ablate(graph, source) for source in sources] for sources in (strongest, weak)]
    print("\ntaken away:                   predicted   frozen     free")
    predicted = [-sum(weight for source, weight in into if source in sources) for sources in (strongest, weak)]
    found = {mode: measure_effect(base, transcoders, ids, edits, mode=mode) for mode in ("frozen", "free")}
    right, wrong = (tokenizer.encode(token, add_special_tokens=False)[0] for token in args.targets)
    for row, name in enumerate(("the strongest", "weak ones, same places")):
        changes = []
        for effect in found.values():
            change = effect.logits_after[row, -1] - effect.logits_before[0, -1]
            changes.append(float(change[right] - change[wrong]))
        print(f"  {name:28}{predicted[row]:+9.3f}{changes[0]:+9.3f}{changes[1]:+9.3f}")

    print(f"\npredicted and measured changes of single nodes:\n{validate_edges(base, transcoders, graph, 64)}")
    pruned = graph.prune(nodes=0.7, edges=0.95)
    print(f"\npruned to {pruned.num_nodes} nodes and {pruned.num_edges:,} edges: {pruned.metadata['pruning']}")
    output = Path(args.output_dir)
    graph.save_pretrained(output)
    print(pruned.to_html(output / "graph.html"))


def _ablate(graph, number):
    node = graph.node(number)
    return FeatureEdit(node.dictionary, node.feature, position=node.position)


def _tokens(scores, tokenizer):
    return [part[0] for part in scores.texts(tokenizer)]


def _scores(scores):
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())


if __name__ == "__main__":
    main()
