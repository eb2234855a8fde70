"""A dictionary that writes at two sites equals two dictionaries with the same features, in every method."""

import pytest
import torch

from hf_transcoders import TranscoderError, capture, splice
from hf_transcoders.circuits import FeatureEdit, FeatureWeights, attribution_graph, head_loadings, measure_effect
from hf_transcoders.circuits.graphs.adjoint import Adjoint
from hf_transcoders.circuits.graphs.attribution import measured
from hf_transcoders.circuits.graphs.autograd import AutogradRows
from hf_transcoders.circuits.graphs.recording import record
from hf_transcoders.circuits.paths.expansion import Expander
from hf_transcoders.models.linear_parts import decoder_rows
from tests.circuits.graphs.setups import some_functionals
from tests.circuits.two_sites import two_site_transcoder
from tests.tiny_models import tiny_model, tiny_tokens


SITES = "layers.1.mlp.out", "layers.2.mlp.out"
FAMILIES = ["gemma2", "gpt2", "gpt_neox"]


def dictionaries_of(family, **changes):
    """A model, a dictionary at two sites, and the two dictionaries that it amounts to."""
    model = tiny_model(family)
    changes = {"skip_connection": True, "normalization": "standardize", **changes}
    both = two_site_transcoder(model, "layers.1.mlp.in", *SITES, **changes)
    return model, {"both": both}, {"first": both.first, "second": both.second}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_splicing_writes_at_both_sites(family):
    model, both, each = dictionaries_of(family)
    ids = tiny_tokens()
    logits = model(ids).logits
    with splice(model, both) as features:
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-4)
    assert [str(site) for site in features] == list(SITES)
    assert features[SITES[0]] is features[SITES[1]] and features[SITES[0]].any()
    with splice(model, each, error="drop"):
        expected = model(ids).logits
    with splice(model, both, error="drop"), capture(model, SITES, stop=False) as written:
        assert torch.equal(model(ids).logits, expected)
    assert (written[SITES[1]] - written[SITES[0]]).abs().max() > 0.1 and not torch.allclose(expected, logits)


def runs_of(family, **changes):
    model, both, each = dictionaries_of(family, **changes)
    return [record(model, some, [tiny_tokens(1, 8)[0]])[0] for some in (both, each)]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_sum_and_add_up_both_sites(family):
    run, separate = runs_of(family)
    targets, values = some_functionals(run)
    rows = Adjoint(run).rows(targets)
    largest = rows.abs().amax(1)
    error = (rows.double().sum(1) - values).abs() / torch.maximum(largest, values.abs())
    assert error.max() < 1e-4
    reference = AutogradRows(run).rows(targets)
    assert ((rows - reference).abs().amax(1) / largest).max() < 3e-5
    # The features of the two dictionaries are the same, and each adds what both add.
    sources = Adjoint(separate).sources
    parts = Adjoint(separate).rows(targets)
    first, second = (sources.segment("feature", number) for number in (0, 1))
    segment = Adjoint(run).sources.segment("feature", 0)
    features = parts[:, first.start : first.end], parts[:, second.start : second.end]
    ours = rows[:, segment.start : segment.end]
    assert all((part != 0).any() for part in features)
    assert ((ours - sum(features)).abs().amax(1) / largest).max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_and_what_they_predict(family):
    model, both, _ = dictionaries_of(family)
    prompt = tiny_tokens(1, 8)[0]
    graph = attribution_graph(model, both, prompt.tolist(), max_logits=2, progress=False)
    assert graph.warning is None and graph.metadata["largest_row_excess"] < 1
    is_edge = graph.is_kind("feature")[graph.source] & graph.is_kind("target")[graph.target]
    edges = is_edge.nonzero()[:, 0]
    edges = edges[graph.weight[edges].abs().topk(8).indices]
    loadings = head_loadings(model, both, graph, edges)
    torch.testing.assert_close(
        loadings.loadings.sum((1, 2)) + loadings.direct, graph.weight[edges], rtol=1e-4, atol=1e-5
    )
    token = graph.targets[0].token_id
    for edge in edges.tolist():
        node = graph.node(int(graph.source[edge]))
        target = graph.node(int(graph.target[edge]))
        token = graph.targets[target.index].token_id
        edit = FeatureEdit("both", node.index, position=node.position)
        effect = measure_effect(model, both, prompt, [edit], mode="direct")
        change = (effect.logits_after - effect.logits_before)[0, -1]
        if model.config.model_type != "gemma2":  # Its logits go through a soft-cap.
            assert float(change[token] - change.mean()) == pytest.approx(
                -float(graph.weight[edge]), rel=1e-3, abs=1e-4
            )


@pytest.mark.parametrize("mode", ["direct", "frozen", "free"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_a_feature_changes_both_sites(family, mode):
    model, both, each = dictionaries_of(family)
    prompt = tiny_tokens(1, 8)

    def effect(named, names):
        edits = [FeatureEdit(name, 3, position=5, kind="steer", value=2.0) for name in names]
        return measure_effect(model, named, prompt, edits, mode=mode, logits_to_keep=0)

    ours, expected, first = effect(both, ["both"]), effect(each, ["first", "second"]), effect(each, ["first"])
    torch.testing.assert_close(ours.logits_after, expected.logits_after, rtol=1e-5, atol=1e-5)
    assert (ours.logits_after - first.logits_after).abs().max() > 1e-3


def test_paths_go_through_both_sites():
    run, _ = runs_of("gpt2")
    targets, _ = some_functionals(run)
    at_end = torch.tensor([row for row, point in enumerate(targets.point) if point == "final"])
    targets = targets[at_end]
    expander = Expander(run)
    reads = expander.read(run.num_layers, "final", targets.position, targets.vector, targets.bias)
    found, sums = expander.expand(reads)
    totals = measured(run, targets)
    assert ((sums.sum(1) - totals).abs() <= 1e-4 * totals.abs().max()).all()
    following = found[found.continues]
    assert following.layer.unique().tolist() == [0, 1, 2] and (following.dictionary >= 0).any()
    again = expander.follow(following, reads)
    assert len(again) == len(following)


def test_what_needs_one_site_says_so():
    model, both, _ = dictionaries_of("gpt2")
    with pytest.raises(
        TranscoderError, match="site=None: the dictionary writes at layers.1.mlp.out, layers.2.mlp.out"
    ):
        decoder_rows(both["both"])
    with pytest.raises(TranscoderError, match="site=layers.0.mlp.out: the dictionary writes at layers.1"):
        decoder_rows(both["both"], site="layers.0.mlp.out")
    gemma, others, _ = dictionaries_of("gemma2")
    with pytest.raises(TranscoderError, match="writes at several sites before the norms after them"):
        FeatureWeights(gemma, others).writes("both")
    with pytest.raises(TranscoderError, match="write to one place"):
        record(model, {**both, "second": both["both"].second}, [tiny_tokens(1, 8)[0]])
