"""Graphs that load can be scored, drawn, pruned and exported; all other files are refused in one sentence."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_transcoders.circuits.graphs import AttributionGraph
from hf_transcoders.circuits.graphs.combine import contrast, union
from hf_transcoders.circuits.graphs.graph_card import graph_card
from hf_transcoders.errors import TranscoderError
from tests.circuits.graphs.random_graph import random_graph
from tests.mutations import mutate_json, mutate_tensors


def use(graph, folder):
    scores = graph.scores()
    assert all(-1e-3 <= value <= 1.001 for value in scores.values()), scores
    graph.to_html(folder / "x.html")
    graph.to_viewer_json(folder / "x.json", slug="x", scan="x")
    graph.prune(0.8, 0.9).to_html(folder / "y.html")
    graph_card(graph, "me/graph")
    for number in range(graph.num_nodes):
        graph.label(number).encode()
        graph.node(number)
        graph.incoming(number)


def small_graph():
    graph = random_graph(num_layers=3, features=1, tokens=("<s>", " a", " b"), difference=True)
    graph = graph.prune(0.9, 0.95)
    graph.metadata["largest_row_error"] = 1e-6
    graph.metadata["certificate"] = {
        "direct": {
            "edges": 4, "pearson": 0.9, "spearman": float("nan"), "sign_agreement": 1.0, "relative_error": 0.1,
            "by_depth": {1: {"edges": 4, "sign_agreement": 1.0, "relative_error": 0.1}},
        }
    }  # fmt: skip
    return graph


def test_graphs_of_every_kind_load(tmp_path):
    first, second = (random_graph(num_layers=3, features=1, seed=0) for _ in range(2))
    for number, graph in enumerate(
        (
            first,
            small_graph(),
            union([first, second]),
            union([first, second], align="feature"),
            contrast(first, second),
            contrast(first, second, align="feature"),
        )
    ):
        graph.save_pretrained(tmp_path / str(number))
        loaded = AttributionGraph.from_pretrained(tmp_path / str(number))
        assert loaded.scores() == graph.scores()
        use(loaded, tmp_path)


def test_mutated_graphs_are_refused_or_usable(tmp_path):
    small_graph().save_pretrained(tmp_path)
    info, tensors = json.loads((tmp_path / "graph.json").read_text()), load_file(tmp_path / "graph.safetensors")
    refused = 0
    for seed in range(80):
        if seed % 2:
            (tmp_path / "graph.json").write_text(json.dumps(mutate_json(info, seed)))
            save_file(tensors, tmp_path / "graph.safetensors")
        else:
            (tmp_path / "graph.json").write_text(json.dumps(info))
            save_file(mutate_tensors(tensors, seed), tmp_path / "graph.safetensors")
        try:
            graph = AttributionGraph.from_pretrained(tmp_path)
        except TranscoderError as error:
            refused += 1
            assert str(error).isprintable()
        else:
            use(graph, tmp_path)
    assert 40 < refused < 80


def _swap(graph):
    return {"source": graph.target.clone(), "target": graph.source.clone()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_swap, "lower to a higher node"),
        (lambda g: {"source": g.source.clone().index_copy_(0, torch.tensor([0]), g.target[:1])}, "lower to a higher"),
        (lambda g: {"weight": g.weight * 2}, "off its total"),
        (lambda g: {"rest": g.rest + g.rest_abs * 0.5 + 1}, "larger than the whole|off its total"),
        (lambda g: {"weight": g.weight * float("nan")}, "not a finite number"),
        (lambda g: {"value": g.value + float("inf")}, "not a finite number"),
        (lambda g: {"rest_abs": -g.rest_abs - 1}, "larger than the whole"),
        (lambda g: {"position": g.position - 5}, "'position'"),
        (lambda g: {"layer": g.layer + 9}, "'layer'"),
        (lambda g: {"dictionary": torch.full_like(g.dictionary, -1)}, "'dictionary'"),
        (lambda g: {"index": torch.zeros_like(g.index)}, "targets that are not its nodes"),
        (lambda g: {"total": g.total * float("nan")}, "no row"),
        (lambda g: {name: getattr(g, name)[:0] for name in ("source", "target", "weight")}, "off its total"),
        (
            lambda g: {
                name: torch.cat([getattr(g, name), getattr(g, name)[-1:]]) for name in ("source", "target", "weight")
            },
            "two edges between the same nodes",
        ),
        (lambda g: {name: getattr(g, name).flip(0) for name in ("source", "target", "weight")}, "order"),
        (lambda g: {"position": g.position.float().to(torch.float8_e4m3fn)}, "float8"),
        (lambda g: {"weight": g.weight.to(torch.complex64)}, "complex64"),
        (lambda g: {"cumulative_influence": g.influence() + 1}, "'cumulative_influence'"),
        (lambda g: {"cumulative_influence": g.influence()[1:]}, "'cumulative_influence'"),
        (lambda g: {"cumulative_influence": g.influence() * float("nan")}, "'cumulative_influence'"),
    ],
)
def test_what_would_change_scores_is_refused(tmp_path, change, reason):
    graph = random_graph(num_layers=3, features=1)
    dataclasses.replace(graph, **change(graph)).save_pretrained(tmp_path)
    with pytest.raises(TranscoderError, match=f"^The graph in .*{reason}"):
        AttributionGraph.from_pretrained(tmp_path)


def test_a_graph_says_how_far_its_rows_are_off(tmp_path):
    graph = random_graph(num_layers=3, features=1)
    graph.weight[0] += 0.3 * graph.weight.abs().max()
    off = float(graph.row_residuals()[graph.expanded].max())
    graph.save_pretrained(tmp_path)
    with pytest.raises(TranscoderError, match="off its total"):
        AttributionGraph.from_pretrained(tmp_path)
    graph.metadata["largest_row_error"] = off
    graph.save_pretrained(tmp_path)
    assert AttributionGraph.from_pretrained(tmp_path).metadata["largest_row_error"] == off


def test_no_nodes(tmp_path):
    graph = random_graph(num_layers=3, features=1)
    graph.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "graph.safetensors")
    save_file({name: tensor[:0].clone() for name, tensor in tensors.items()}, tmp_path / "graph.safetensors")
    with pytest.raises(TranscoderError, match="cannot be read"):
        AttributionGraph.from_pretrained(tmp_path)
