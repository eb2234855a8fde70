"""Graphs as data: files, influence, pruning, and rows that always sum."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_transcoders import TranscoderError
from hf_transcoders.circuits.graphs import KINDS, AttributionGraph, TargetInfo, attribution_graph
from hf_transcoders.circuits.graphs.pruning import _threshold
from tests.circuits.graphs.random_graph import random_graph
from tests.circuits.graphs.setups import mixes
from tests.tiny_models import tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def graph():
    model = tiny_model("gpt2")
    return attribution_graph(model, mixes(model)["before the norm, a layer without"], tiny_tokens(1, 7)[0].tolist(),
                             max_features=60, progress=False)  # fmt: skip


def dense(graph):
    """Shares of magnitudes, `(targets, sources)`, and the share of `rest`."""
    weights = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    weights[graph.target, graph.source] = graph.weight.double().abs()
    rest = graph.rest_abs.double()
    total = (weights.sum(1) + rest).clamp(min=1e-10)
    return weights / total[:, None], rest / total


def residual(graph):
    return float(graph.row_residuals()[graph.expanded].max())


def test_nodes_are_in_order_and_rows_sum(graph):
    assert (graph.source < graph.target).all() and (graph.target.diff() >= 0).all()
    assert residual(graph) < 1e-5
    assert set(graph.kind.tolist()) == set(range(len(KINDS)))
    features = graph.is_kind("feature")
    assert features.sum() == 60 and torch.equal(graph.expanded, features | graph.is_kind("target"))
    assert graph.target_weights.sum() == pytest.approx(1)
    assert (graph.value[features] > 0).all()


def test_influence_equals_the_inverse(graph):
    share, _ = dense(graph)
    eye = torch.eye(graph.num_nodes, dtype=torch.float64)
    expected = graph.target_weights @ (torch.linalg.inv(eye - share) - eye)
    torch.testing.assert_close(graph.influence(), expected, rtol=1e-9, atol=1e-12)
    # All influence ends at nodes without a row or in `rest`.
    ends = graph.influence()[~graph.expanded].sum().item()
    assert ends + graph.scores()["rest"] == pytest.approx(1, abs=1e-6)


def test_scores_are_those_of_the_paper(graph):
    share, rest = dense(graph)
    influence, weights = graph.influence(), graph.target_weights
    missed, tokens = graph.is_kind("error", "mlp"), graph.is_kind("token", "position")
    scores = graph.scores()
    ratio = influence[tokens].sum() / (influence[tokens].sum() + influence[missed].sum())
    assert scores["replacement"] == pytest.approx(float(ratio))
    error_share = share[:, missed].sum(1) + rest * (graph.rest_error / graph.rest_abs.clamp(min=1e-30)).double()
    flow = (influence + weights) * graph.expanded
    assert scores["completeness"] == pytest.approx(float((flow * (1 - error_share)).sum() / flow.sum()), rel=1e-6)
    assert 0 < scores["replacement"] < 1 and 0 < scores["completeness"] < 1


def test_pruning_keeps_what_matters_and_rows_that_sum(graph):
    pruned = graph.prune(0.6, 0.9)
    assert pruned.num_nodes < graph.num_nodes and pruned.num_edges < graph.num_edges
    assert residual(pruned) < 1e-5 and (pruned.source < pruned.target).all()
    for kind in ("token", "position", "target"):
        assert pruned.is_kind(kind).sum() == graph.is_kind(kind).sum()
    # Features have edges in and out; other nodes have edges out.
    nodes = torch.arange(pruned.num_nodes)
    has_out, has_in = torch.isin(nodes, pruned.source), torch.isin(nodes, pruned.target)
    inner = pruned.is_kind("feature", "error", "mlp", "bias")
    assert has_out[inner].all() and has_in[pruned.is_kind("feature")].all()
    report = pruned.metadata["pruning"]
    assert report["dropped_nodes"] == graph.num_nodes - pruned.num_nodes
    errors = graph.is_kind("error", "mlp").sum() - pruned.is_kind("error", "mlp").sum()
    assert report["dropped_error_nodes"] == errors
    assert 0 < report["dropped_error_influence"] <= report["dropped_influence"] < 0.5
    assert pruned.scores()["rest"] > graph.scores()["rest"]
    everything = graph.prune(1.0, 1.0)
    assert everything.num_nodes >= graph.num_nodes - int((graph.influence() == 0).sum())
    fewest = graph.prune(0.0, 0.0)
    assert fewest.num_nodes < pruned.num_nodes and residual(fewest) < 1e-5


def test_thresholds_are_cumulative():
    values = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    assert [float(_threshold(values, share)) for share in (0.3, 0.4, 0.5, 0.7, 0.95)] == [0.4, 0.4, 0.3, 0.3, 0.1]
    assert _threshold(torch.zeros(3), 0.5) == 0.0


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_shares_are_between_0_and_1(graph, share):
    with pytest.raises(TranscoderError, match="`nodes` is .*between 0 and 1"):
        graph.prune(nodes=share)
    with pytest.raises(TranscoderError, match="`edges` is .*between 0 and 1"):
        graph.prune(edges=share)


def test_selecting_puts_the_others_into_rest(graph):
    keep = ~graph.is_kind("error")
    kept = graph.select(keep)
    assert residual(kept) < 1e-5 and not kept.is_kind("error").any()
    from_errors = graph.is_kind("error")[graph.source]
    target = int(graph.is_kind("target").nonzero()[0])
    lost = graph.weight[from_errors & (graph.target == target)]
    new = int(torch.cumsum(keep.long(), 0)[target] - 1)
    assert kept.rest[new] - graph.rest[target] == pytest.approx(float(lost.sum()), abs=1e-4)
    assert kept.rest_error[new] - graph.rest_error[target] == pytest.approx(float(lost.abs().sum()), rel=1e-4)


def test_nodes_and_labels(graph):
    number = int(graph.is_kind("feature").nonzero()[5])
    node = graph.node(number)
    assert node.kind == "feature" and node.total == pytest.approx(node.value, rel=1e-4)
    assert graph.find(node.dictionary, node.index, node.position) == number
    assert (
        graph.label(number)
        == f'L{node.layer} feature {node.index} at "{graph.tokens[node.position]}" ({node.position})'
    )
    assert graph.label(graph.num_nodes - 1) == graph.targets[-1].label
    assert graph.label(0) == f'token at "{graph.tokens[0]}" (0)' and graph.node(0).total is None
    labels = [graph.label(bias) for bias in graph.is_kind("bias").nonzero()[:, 0].tolist()]
    assert labels == ["L0 biases", "L1 biases", "L2 biases", "bias after the last block"]
    incoming = graph.incoming(number)
    assert len(incoming) == (graph.target == number).sum() and incoming[0][0] < number
    assert [abs(weight) for _, weight in incoming] == sorted((abs(weight) for _, weight in incoming), reverse=True)
    source, weight = incoming[0]
    assert (number, weight) in graph.outgoing(source)
    with pytest.raises(TranscoderError, match=f"There is no node {graph.num_nodes}"):
        graph.node(graph.num_nodes)
    with pytest.raises(TranscoderError, match="no dictionary 'x': choose from"):
        graph.find("x", 0, 0)
    with pytest.raises(TranscoderError, match="is not in the graph"):
        graph.find(node.dictionary, 10**6, 0)


def test_labels_are_one_line(graph):
    broken = dataclasses.replace(
        graph, tokens=["\n"] * len(graph.tokens), targets=[TargetInfo("a\n", 0, 1.0)] * len(graph.targets)
    )
    assert broken.label(0) == 'token at "⏎" (0)' and broken.label(graph.num_nodes - 1) == "a⏎"


# ---------------------------------------------------------------------------------------------------- files


def test_saved_and_loaded_bit_for_bit(graph, tmp_path):
    graph.save_pretrained(tmp_path / "graph")
    loaded = AttributionGraph.from_pretrained(tmp_path / "graph")
    for each in dataclasses.fields(graph):
        before, after = getattr(graph, each.name), getattr(loaded, each.name)
        if isinstance(before, torch.Tensor):
            assert before.dtype == after.dtype and torch.equal(before.nan_to_num(1e9), after.nan_to_num(1e9)), (
                each.name
            )
        else:
            assert before == after, each.name
    assert loaded.targets == graph.targets and isinstance(loaded.targets[0], TargetInfo)
    assert loaded.scores() == graph.scores()
    # Over an older graph, and beside unrelated files.
    (tmp_path / "graph" / "notes.txt").write_text("mine")
    pruned = graph.prune()
    pruned.save_pretrained(tmp_path / "graph")
    assert AttributionGraph.from_pretrained(tmp_path / "graph").num_nodes == pruned.num_nodes
    assert sorted(path.name for path in (tmp_path / "graph").iterdir()) == [
        "graph.json",
        "graph.safetensors",
        "notes.txt",
    ]


def change_json(folder, **changes):
    path = folder / "graph.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensor(folder, name, tensor):
    tensors = load_file(folder / "graph.safetensors")
    save_file({**tensors, name: tensor(tensors[name])}, folder / "graph.safetensors")


def truncate(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "short json": lambda folder: truncate(folder, "graph.json"),
    "short tensors": lambda folder: truncate(folder, "graph.safetensors"),
    "json of another kind": lambda folder: (folder / "graph.json").write_text("[]"),
    "an edge to nowhere": lambda folder: change_tensor(folder, "source", lambda value: value + 10**6),
    "fewer weights": lambda folder: change_tensor(folder, "weight", lambda value: value[1:].clone()),
    "fewer values": lambda folder: change_tensor(folder, "value", lambda value: value[1:].clone()),
    "an unknown kind": lambda folder: change_tensor(folder, "kind", lambda value: value + len(KINDS)),
    "a longer prompt": lambda folder: change_json(folder, input_ids=[1] * 50),
    "a shorter prompt": lambda folder: change_json(folder, input_ids=[1], tokens=["a"]),
    "no targets": lambda folder: change_json(folder, targets=[]),
    "a target of another kind": lambda folder: change_json(folder, targets=[{"name": "x"}]),
    "no dictionaries": lambda folder: change_json(folder, dictionaries=[]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(graph, tmp_path, damage):
    graph.save_pretrained(tmp_path)
    DAMAGES[damage](tmp_path)
    with pytest.raises(
        TranscoderError, match="cannot be read .*a file is damaged or cut short, so copy or download it again"
    ):
        AttributionGraph.from_pretrained(tmp_path)


def test_missing_and_newer_files_are_refused(graph, tmp_path):
    with pytest.raises(TranscoderError, match="is not an attribution graph"):
        AttributionGraph.from_pretrained(tmp_path)
    graph.save_pretrained(tmp_path)
    change_json(tmp_path, format_version=99)
    with pytest.raises(TranscoderError, match="written in format 99.*upgrade it"):
        AttributionGraph.from_pretrained(tmp_path)


def test_feature_numbers_are_those_of_the_nodes():
    graph = random_graph()
    nodes = [graph.node(number) for number in range(graph.num_nodes) if graph.node(number).kind == "feature"]
    expected = {name: sorted({n.index for n in nodes if n.dictionary == name}) for name in graph.dictionaries}
    assert nodes and graph.feature_numbers() == {name: its for name, its in expected.items() if its}
