"""Ablations have the effects that edges predict while everything else is held fixed."""

import pytest
import torch

from hf_transcoders import TranscoderError
from hf_transcoders.circuits.graphs import AttributionGraph, attribution_graph, union, validate_edges
from hf_transcoders.circuits.graphs.graph_card import graph_card
from hf_transcoders.circuits.graphs.page_data import page_data
from tests.circuits.interventions.setups import random_dictionary
from tests.tiny_models import TINY_CONFIGS, tiny_model, tiny_tokens


def _graph(family, targets, **changes):
    model = tiny_model(family)
    transcoders = {
        f"t{i}": random_dictionary(model, f"layers.{i}.mlp.in", f"layers.{i}.mlp.out", seed=i, **changes)
        for i in range(3)
    }
    prompt = tiny_tokens(1)[0].tolist()
    return model, transcoders, attribution_graph(model, transcoders, prompt, targets=targets, progress=False)


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_direct_effects_are_the_edges(family):
    targets = [7, (5, 9), torch.linspace(-1, 1, 32)]
    model, transcoders, graph = _graph(family, targets, skip_connection=True)
    # Strong edges, for which rounding does not matter, into features and into every target.
    from_features = graph.is_kind("feature")[graph.source]
    into_target = graph.is_kind("target")[graph.target]
    chosen = []
    for part in (from_features & ~into_target, from_features & into_target):
        numbers = part.nonzero()[:, 0]
        chosen += numbers[graph.weight[numbers].abs().topk(12).indices].tolist()
    pairs = [(int(graph.source[number]), int(graph.target[number])) for number in chosen]
    found = validate_edges(model, transcoders, graph, pairs, batch_size=5)
    largest = found.predicted.abs().max()
    torch.testing.assert_close(found.measured["direct"], found.predicted, rtol=1e-3, atol=1e-5 * float(largest))
    # In the other modes the model responds, so that measurements differ from predictions.
    assert (found.measured["frozen"] - found.predicted).abs().max() > 1e-3 * largest
    assert (found.measured["free"] - found.measured["frozen"]).abs().max() > 1e-3 * largest
    summary = found.summary()
    assert summary["direct"]["sign_agreement"] == 1 and summary["direct"]["pearson"] > 0.9999
    assert summary["direct"]["relative_error"] < 1e-3 < summary["free"]["relative_error"]
    assert sum(entry["edges"] for entry in summary["free"]["by_depth"].values()) == len(pairs)
    # The graph is unchanged; a new graph has the result.
    assert "certificate" not in graph.metadata
    assert graph.with_validation(found).metadata["certificate"] == summary
    assert "all but the direct effect" in found.to_text() == str(found)
    assert len(found.to_dict()["edges"]) == len(pairs)


def test_edges_are_chosen_by_influence_and_by_chance():
    model, transcoders, graph = _graph("llama", None)
    found = validate_edges(model, transcoders, graph.prune(), 10, modes=["direct"])
    assert len(found.predicted) == 10 and set(found.measured) == {"direct"}
    assert len(set(zip(found.source.tolist(), found.target.tolist(), strict=True))) == 10
    again = validate_edges(model, transcoders, graph.prune(), 10, modes=["direct"])
    assert torch.equal(found.source, again.source)
    assert graph.prune().is_kind("feature")[found.source].all()


def test_a_validation_goes_with_the_graph_to_files_and_page(tmp_path):
    model, transcoders, graph = _graph("llama", None)
    found = validate_edges(model, transcoders, graph.prune(), 4)
    graph.with_validation(found).save_pretrained(tmp_path)
    loaded = AttributionGraph.from_pretrained(tmp_path)
    validation = page_data(loaded.prune())["graphs"][0]["validation"]
    assert validation["summary"]["direct"]["pearson"] == found.summary()["direct"]["pearson"]
    assert [edge["predicted"] for edge in validation["edges"]] == found.predicted.tolist()
    assert [(edge["source_label"], edge["target_label"]) for edge in validation["edges"]] == found.labels
    assert "attention and norms" in graph_card(loaded, "me/graph")
    # Graphs that were saved before edges were saved with the summary.
    del loaded.metadata["validated_edges"]
    assert page_data(loaded.prune())["graphs"][0]["validation"]["edges"] == []


def test_edges_that_cannot_be_validated_are_refused():
    model, transcoders, graph = _graph("llama", None)
    token = int(graph.is_kind("token").nonzero()[0])
    with pytest.raises(TranscoderError, match="out of a feature"):
        validate_edges(model, transcoders, graph, [(token, graph.num_nodes - 1)])
    with pytest.raises(TranscoderError, match="of at least 1"):
        validate_edges(model, transcoders, graph, 0)
    edge = next(
        (s, t) for s, t in zip(graph.source.tolist(), graph.target.tolist(), strict=True) if graph.node(s).feature
    )
    with pytest.raises(TranscoderError, match="leave `seed` out"):
        validate_edges(model, transcoders, graph, [edge], seed=1)
    with pytest.raises(TranscoderError, match="direct, frozen, free"):
        validate_edges(model, transcoders, graph, 4, modes=["loose"])
    with pytest.raises(TranscoderError, match="'t2' too"):
        validate_edges(model, {name: transcoders[name] for name in ("t0", "t1")}, graph, 4)
    with pytest.raises(TranscoderError, match="several prompts"):
        validate_edges(model, transcoders, union([graph], align="feature"), 4)
