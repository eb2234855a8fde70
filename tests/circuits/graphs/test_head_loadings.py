"""The parts of an edge sum to its weight, and each equals the effect of switching heads off and on."""

import sys

import pytest
import torch

from hf_transcoders import TranscoderError
from hf_transcoders.circuits.graphs import Target, adjoint, attribution_graph, head_loadings
from hf_transcoders.circuits.graphs.autograd import AutogradRows
from hf_transcoders.circuits.graphs.head_loadings import _Lift, _read
from hf_transcoders.circuits.graphs.rerun import rerun
from tests.circuits.graphs.setups import mixes
from tests.tiny_models import HIDDEN_SIZE, NUM_LAYERS, tiny_model, tiny_tokens


HEADS = 4


def graph_of(model, dictionaries, **changes):
    prompt = tiny_tokens(1, 8)[0].tolist()
    changes = changes if "targets" in changes else {"max_logits": 2, **changes}
    return attribution_graph(model, dictionaries, prompt, progress=False, **changes)


def source_numbers(run, graph):
    """Number of each node of a graph among all sources of its run."""
    kinds, positions, indices = [], [], []
    for segment in AutogradRows(run).sources.segments:
        size = segment.end - segment.start
        feature = segment.kind == "feature"
        of = segment.features or segment.writer
        kinds += [(segment.kind, segment.layer, of.dictionary if of else -1)] * size
        positions += (
            segment.features.position.tolist() if feature else ([-1] if segment.kind == "bias" else range(size))
        )
        indices += segment.features.feature.tolist() if feature else [-1] * size
    numbers = {key: number for number, key in enumerate(zip(kinds, positions, indices, strict=True))}
    found = []
    for number in range(graph.num_nodes):
        node = graph.node(number)
        dictionary = int(graph.dictionary[number])
        index = node.index if node.kind == "feature" else -1
        found.append(numbers.get(((node.kind, node.layer, dictionary), node.position, index), -1))
    return torch.tensor(found)


def without_biases(graph):
    return (~graph.is_kind("bias")[graph.source]).nonzero()[:, 0]


@pytest.mark.parametrize("mix", list(mixes(tiny_model("llama"))))
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox"])
def test_parts_sum_to_the_weight(family, mix):
    model = tiny_model(family)
    dictionaries = mixes(model)[mix]
    graph = graph_of(model, dictionaries, max_features=60)
    edges = without_biases(graph)
    result = head_loadings(model, dictionaries, graph, edges)
    parts = torch.cat([result.loadings.flatten(1), result.direct[:, None]], dim=1)
    errors = (parts.sum(1) - result.weight).abs() / parts.abs().sum(1).maximum(result.weight.abs().mean())
    assert errors.max() < 1e-5
    # Between different tokens all goes through heads; within one token not all does.
    across = graph.position[result.source] != graph.position[result.target]
    assert across.any() and (result.direct[across] == 0).all() and (result.direct != 0).any()
    assert (result.loadings != 0).any(0).any(0).all()


@pytest.mark.parametrize(
    ("family", "mix"), [("llama", "skips"), ("gemma2", "attention"), ("gpt_neox", "over several layers")]
)
def test_parts_are_what_switching_heads_says(family, mix):
    """With all heads below a layer off, and one alone on in it, a source reaches its target by paths of that head only."""
    model = tiny_model(family)
    dictionaries = mixes(model)[mix]
    graph = graph_of(model, dictionaries, max_features=20)
    edges = without_biases(graph)
    edges = edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(0))[:100]]
    result = head_loadings(model, dictionaries, graph, edges)
    run = rerun(model, dictionaries, graph)
    functionals, row = _read(run, graph, result.target)
    # A graph without the features that were not expanded has fewer nodes than there are sources.
    column = source_numbers(run, graph)[result.source]
    autograd = AutogradRows(run)
    patterns = autograd.frozen.patterns

    def effect(layer, heads):
        on = torch.isin(torch.arange(HEADS), torch.tensor(heads))[:, None, None]
        autograd.frozen.patterns[:] = [
            pattern * (on if number == layer else float(number > layer)) for number, pattern in enumerate(originals)
        ]
        return autograd.rows(functionals)[row, column]

    originals = list(patterns)
    scale = result.weight.abs().max()
    direct = effect(NUM_LAYERS, [])
    assert (result.direct - direct).abs().max() < 1e-5 * scale
    for layer in range(NUM_LAYERS):
        none = effect(layer, [])
        for head in range(HEADS):
            expected = effect(layer, [head]) - none
            assert (result.loadings[:, layer, head] - expected).abs().max() < 2e-5 * scale


@pytest.mark.parametrize("mix", ["relu", "skips"])
def test_nothing_is_computed_or_kept_that_only_rows_or_skips_need(mix, monkeypatch):
    """No products with all decoder rows, and of the forward pass only the inputs of skip connections."""
    model = tiny_model("llama")
    dictionaries = mixes(model)[mix]
    graph = graph_of(model, dictionaries)
    lifts = []

    def lift(*args):
        lifts.append(_Lift(*args))
        return lifts[-1]

    monkeypatch.setattr(adjoint, "decoder_rows", None)
    monkeypatch.setattr(sys.modules[_Lift.__module__], "_Lift", lift)
    assert head_loadings(model, dictionaries, graph).loadings.any()
    read = {f"layers.{layer}.mlp.in" for layer in range(NUM_LAYERS)} if mix == "skips" else set()
    assert lifts and all({str(site) for site in lift.read} == read for lift in lifts)


def test_by_default_the_edges_that_carry_most_and_texts_of_them():
    model = tiny_model("llama")
    dictionaries = mixes(model)["relu"]
    graph = graph_of(model, dictionaries)
    result = head_loadings(model, dictionaries, graph, max_edges=7)
    assert len(result.edges) == 7 and not graph.is_kind("bias")[result.source].any()
    flow = graph.influence() + graph.target_weights
    sums = graph.rest_abs.double().index_add(0, graph.target, graph.weight.double().abs())
    carried = graph.weight.double().abs() / sums[graph.target] * flow[graph.target]
    carried[graph.is_kind("bias")[graph.source]] = 0
    assert set(result.edges.tolist()) == set(carried.topk(7).indices.tolist())
    edge, layer, head, value = result.top(3)[0]
    assert value == result.loadings[edge, layer, head] and abs(value) == result.loadings.abs().max()
    assert f"L{layer}H{head}" in result.to_text(3) and len(result.to_text(3).splitlines()) == 4
    for entry in result.to_dict(heads=2):
        assert len(entry["heads"]) == 2
        parts = sum(part["loading"] for part in entry["heads"]) + entry["other_heads"] + entry["direct"]
        assert parts == pytest.approx(entry["weight"], rel=1e-4, abs=1e-4)
    # A pruned graph has other numbers and the same edges.
    pruned = graph.prune()
    again = head_loadings(model, dictionaries, pruned, max_edges=5)
    assert torch.equal(again.weight, pruned.weight[again.edges])


def test_edges_into_targets_of_every_kind():
    model = tiny_model("llama")
    dictionaries = mixes(model)["relu"]
    targets = [
        (5, 6),
        Target.direction(torch.linspace(-1, 1, HIDDEN_SIZE), "layers.1.resid_post", position=4, label="one"),
        Target.pre_activation(next(iter(graph_of(model, dictionaries).dictionaries)), 3),
    ]
    graph = graph_of(model, dictionaries, targets=targets)
    edges = graph.is_kind("target")[graph.target] & ~graph.is_kind("bias")[graph.source]
    result = head_loadings(model, dictionaries, graph, edges.nonzero()[:, 0])
    assert set(graph.index[result.target].tolist()) == {0, 1, 2}
    total = result.loadings.sum((1, 2)) + result.direct
    torch.testing.assert_close(total, result.weight, rtol=1e-4, atol=1e-4)


def test_refused():
    model = tiny_model("llama")
    dictionaries = mixes(model)["relu"]
    graph = graph_of(model, dictionaries)
    for edges in ([graph.num_edges], [-1], [[0]]):
        with pytest.raises(TranscoderError, match=f"numbers of edges of the graph, 0 to {graph.num_edges - 1}"):
            head_loadings(model, dictionaries, graph, edges)
    with pytest.raises(TranscoderError, match="give one of the two"):
        head_loadings(model, dictionaries, graph, [0], max_edges=4)
    with pytest.raises(TranscoderError, match="`max_edges` is 0; give at least 1"):
        head_loadings(model, dictionaries, graph, max_edges=0)
    assert len(head_loadings(model, dictionaries, graph, []).top()) == 0
    bias = int(graph.is_kind("bias")[graph.source].nonzero()[0])
    with pytest.raises(TranscoderError, match=f"Edge {bias} comes from biases"):
        head_loadings(model, dictionaries, graph, [bias])
    with pytest.raises(TranscoderError, match="give those of the graph, in their order"):
        head_loadings(model, dictionaries[:2], graph)
    with pytest.raises(TranscoderError, match="another model or other dictionaries"):
        head_loadings(tiny_model("llama", seed=1), dictionaries, graph)
