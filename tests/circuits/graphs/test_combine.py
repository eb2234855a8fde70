"""Unions and contrasts of graphs: rows sum to the mean and to the difference."""

import pytest
import torch

from hf_transcoders import TranscoderError
from hf_transcoders.circuits.graphs import attribution_graph, contrast, union
from hf_transcoders.circuits.graphs.graph import AttributionGraph
from tests.circuits.interventions.setups import random_dictionary
from tests.tiny_models import tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def graphs():
    model = tiny_model("gpt2")
    transcoders = [random_dictionary(model, f"layers.{i}.mlp.in", f"layers.{i}.mlp.branch", seed=i) for i in (0, 2)]
    prompts = [*tiny_tokens().tolist(), tiny_tokens(1, 9, seed=3)[0].tolist()]
    return attribution_graph(model, transcoders, prompts, targets=[(5, 9)], max_features=40, progress=False)


def test_union_and_contrast_sum_and_keep_edges_upwards(graphs):
    one, other, shorter = graphs
    for found, total in (
        (union([one, other]), (one.total[-1] + other.total[-1]) / 2),
        (contrast(one, other), one.total[-1] - other.total[-1]),
        (union(graphs, align="feature"), sum(graph.total[-1] for graph in graphs) / 3),
        (contrast(one, shorter, align="feature"), one.total[-1] - shorter.total[-1]),
    ):
        assert (found.source < found.target).all()
        torch.testing.assert_close(found.total[-1], total, rtol=1e-4, atol=1e-4)
        sums = found.rest.index_add(0, found.target, found.weight)
        has_row = found.expanded
        torch.testing.assert_close(sums[has_row], found.total[has_row], rtol=1e-3, atol=1e-3)


def test_a_graph_less_itself_is_nothing_and_the_union_with_itself_is_itself(graphs):
    nothing = contrast(graphs[0], graphs[0])
    assert nothing.weight.abs().max() == 0 and nothing.value.abs().max() == 0
    same = union([graphs[0], graphs[0]])
    assert same.num_nodes == graphs[0].num_nodes and same.num_edges == graphs[0].num_edges
    torch.testing.assert_close(same.influence().sort().values, graphs[0].influence().sort().values)


def test_a_union_finds_a_feature_wherever_it_is(graphs):
    merged = union(graphs, align="feature")
    features = merged.is_kind("feature")
    pairs = set(zip(merged.dictionary[features].tolist(), merged.index[features].tolist(), strict=True))
    assert len(pairs) == int(features.sum())
    single = {
        pair
        for graph in graphs
        for pair in zip(
            graph.dictionary[graph.is_kind("feature")].tolist(),
            graph.index[graph.is_kind("feature")].tolist(),
            strict=True,
        )
    }
    assert pairs == single


def test_it_is_saved_like_any_other(graphs, tmp_path):
    merged = union(graphs, align="feature")
    merged.save_pretrained(tmp_path)
    again = AttributionGraph.from_pretrained(tmp_path)
    assert torch.equal(again.weight, merged.weight) and again.metadata["union"]["align"] == "feature"


def test_what_does_not_fit_is_refused(graphs):
    with pytest.raises(TranscoderError, match="12 and 9 tokens"):
        union(graphs)
    with pytest.raises(TranscoderError, match="align='layer' is unknown"):
        union(graphs[:2], align="layer")
    with pytest.raises(TranscoderError, match="at least one"):
        union([])
    model = tiny_model("gpt2")
    more = attribution_graph(model, [], [tiny_tokens(1)[0].tolist()], targets=[1, 2], progress=False)[0]
    with pytest.raises(TranscoderError, match="different models or dictionaries"):
        contrast(graphs[0], more)
