"""Cross-layer transcoders in every method that reads or writes a language model."""

import pytest
import torch

from hf_transcoders import CrossLayerTranscoder, CrossLayerTranscoderConfig, TranscoderError, capture, splice
from hf_transcoders.circuits import FeatureEdit, FeatureWeights, attribution_graph, measure_effect
from hf_transcoders.circuits.graphs.adjoint import Adjoint
from hf_transcoders.circuits.graphs.attribution import measured
from hf_transcoders.circuits.graphs.autograd import AutogradRows
from hf_transcoders.circuits.graphs.combine import union
from hf_transcoders.circuits.graphs.graph import AttributionGraph
from hf_transcoders.circuits.graphs.recording import record
from hf_transcoders.circuits.paths.expansion import Expander
from hf_transcoders.features.promoted_tokens import promoted_tokens
from hf_transcoders.lm.stream import direct_logits
from hf_transcoders.models.linear_parts import decoder_rows
from tests.circuits.graphs.setups import some_functionals
from tests.circuits.interventions.setups import transcoder_set
from tests.tiny_models import NUM_LAYERS, tiny_model, tiny_tokens


FAMILIES = ["gemma2", "gpt2", "gpt_neox"]


def random_cross_layer(model, **changes):
    """A cross-layer transcoder of all layers with random weights, normalization and skip connections included."""
    changes = {"activation": "relu", "skip_connection": True, "normalization": "standardize", **changes}
    transcoder = CrossLayerTranscoder.from_set(transcoder_set(model, **changes))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for source in transcoder.sources:
            later = source.W_dec[:, 1:]
            later.copy_(0.3 * torch.randn(later.shape, generator=generator))
    return transcoder.eval()


def written_by_hand(model, transcoder, ids):
    """Reconstruction of every output site of a spliced model, layer by layer with plain tensors."""
    written = {}
    for site in transcoder.config.output_sites:
        written[site] = 0.0
    for source in transcoder.sources:
        # What it reads is changed by the layers before it alone.
        with capture(model, [source.config.input_site]) as read:
            model(ids)
        for site, part in source(read[source.config.input_site]).reconstruction.items():
            written[site] = written[site] + part
        yield source.config.output_site, written[source.config.output_site]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_splicing_writes_the_sum_of_all_layers(family):
    model = tiny_model(family)
    transcoder, ids = random_cross_layer(model), tiny_tokens()
    logits = model(ids).logits
    with splice(model, transcoder) as features:
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-4)
    assert [str(site) for site in features] == transcoder.config.output_sites
    with (
        splice(model, transcoder, error="drop"),
        capture(model, transcoder.config.output_sites, stop=False) as written,
    ):
        model(ids)
        for site, total in written_by_hand(model, transcoder, ids):
            torch.testing.assert_close(written[site], total, rtol=1e-4, atol=1e-4)
    for source in transcoder.sources:
        with capture(model, [source.config.input_site]) as read:
            model(ids)
        expected = source.encode(read[source.config.input_site])
        torch.testing.assert_close(features[source.config.output_site], expected, rtol=1e-4, atol=1e-4)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    with splice(model, transcoder, error="drop", mask=mask):
        assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("activation", [{}, {"activation": "topk", "k": 5}, {"activation": "jumprelu"}])
@torch.no_grad()
def test_a_zero_padded_set_has_the_same_logits_and_the_same_graph(activation):
    model = tiny_model("llama")
    transcoders = transcoder_set(model, skip_connection=True, **activation)
    padded = CrossLayerTranscoder.from_set(transcoders)
    ids = tiny_tokens(1, 8)
    with splice(model, transcoders, error="drop"):
        expected = model(ids).logits
    with splice(model, padded, error="drop"):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (
        attribution_graph(model, each, ids[0].tolist(), max_logits=2, progress=False) for each in (padded, transcoders)
    )
    for name in ("kind", "layer", "position", "index", "dictionary", "source", "target"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("value", "weight", "total"):
        one, other = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_sum_and_equal_those_of_autograd(family):
    model = tiny_model(family)
    (run,) = record(model, random_cross_layer(model), [tiny_tokens(1, 8)[0]])
    targets, values = some_functionals(run)
    rows, reference = Adjoint(run).rows(targets), AutogradRows(run).rows(targets)
    largest = rows.abs().amax(1)
    error = (rows.double().sum(1) - values).abs() / torch.maximum(largest, values.abs())
    assert error.max() < 1e-4
    assert ((rows - reference).abs().amax(1) / largest).max() < 3e-5


def test_a_graph_has_one_node_for_each_feature_and_is_saved(tmp_path):
    model = tiny_model("gpt2")
    transcoder, ids = random_cross_layer(model), tiny_tokens(1, 8)
    graph = attribution_graph(model, transcoder, ids[0].tolist(), max_logits=2, progress=False)
    assert graph.warning is None and graph.dictionaries == list(transcoder)
    features = graph.is_kind("feature").nonzero()[:, 0]
    nodes = torch.stack([graph.dictionary, graph.position, graph.index], 1)[features]
    assert len(nodes.unique(dim=0)) == len(nodes) > 20
    assert torch.equal(graph.layer[features], graph.dictionary[features])
    graph.save_pretrained(tmp_path / "graph")
    loaded = AttributionGraph.from_pretrained(tmp_path / "graph")
    sites = [entry["output_sites"] for entry in loaded.metadata["dictionaries"]]
    assert sites == [transcoder.config.written_sites(number) for number in range(NUM_LAYERS)]
    assert union([loaded, graph]).num_nodes == graph.num_nodes


def test_a_relay_of_a_decoder_block_leaves_the_attributions_of_logits():
    """A feature of a later layer with the same activations takes over what an earlier feature writes there."""
    model = tiny_model("llama")
    ids = tiny_tokens(1, 8)
    layer, feature, later = 0, 3, 2
    transcoder = random_cross_layer(model, skip_connection=False, normalization="none", num_features=25)
    relay = 24
    with torch.no_grad():
        for source in transcoder.sources:  # The relay is a feature that is never active yet.
            source.W_enc[relay], source.b_enc[relay], source.W_dec[relay] = 0.0, -1.0, 0.0
        transcoder.sources[layer].b_enc[feature] = 5.0
        target = transcoder.sources[later]
        read = [transcoder.sources[layer].config.input_site, target.config.input_site]
        with capture(model, read) as inputs:
            model(ids)
        activations = transcoder.sources[layer].encode(inputs[read[0]])[0, :, feature].double()
        assert (activations > 0).all()

    def logit_edges():
        graph = attribution_graph(
            model, transcoder, ids[0].tolist(), max_logits=3, edges_per_node=10_000, progress=False
        )
        assert graph.warning is None
        found = {}
        for source, to, weight in zip(
            graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True
        ):
            node, logit = graph.node(source), graph.node(to)
            if logit.kind == "target":
                found[node.kind, node.layer, node.position, node.index, logit.index] = weight
        return found

    before = logit_edges()
    with torch.no_grad():
        # More dimensions than tokens: an encoder row that gives these activations on this prompt.
        inputs = torch.cat([inputs[read[1]][0].double(), torch.ones(8, 1, dtype=torch.float64)], 1)
        row = torch.linalg.lstsq(inputs, activations[:, None], driver="gelsd").solution[:, 0]
        target.W_enc[relay], target.b_enc[relay] = row[:-1].float(), float(row[-1])
        target.W_dec[relay, 0] = transcoder.sources[layer].W_dec[feature, later - layer]
        transcoder.sources[layer].W_dec[feature, later - layer] = 0.0
    after = logit_edges()
    moved = 0
    for (kind, at, position, index, logit), weight in before.items():
        ours = after[kind, at, position, index, logit] if (kind, at, position, index, logit) in after else 0.0
        if (kind, at, index) == ("feature", layer, feature):
            through = after.get(("feature", later, position, relay, logit), 0.0)
            moved += abs(through) > 1e-3
            ours += through
        assert ours == pytest.approx(weight, rel=1e-3, abs=2e-4), (kind, at, position, index)
    assert moved >= 3 and not any(key[3] == relay and key[1] == later and key[0] == "feature" for key in before)


@pytest.mark.parametrize("mode", ["direct", "frozen", "free"])
def test_an_edit_writes_at_all_layers(mode):
    model = tiny_model("gpt2")
    transcoder, ids = random_cross_layer(model, skip_connection=False), tiny_tokens(1, 8)
    name = next(iter(transcoder))
    edits = [FeatureEdit(name, 3, position=5, kind="steer", value=2.0)]
    effect = measure_effect(model, transcoder, ids, edits, mode=mode, logits_to_keep=0)
    # The same change by one edit for each site, with dictionaries of one site and the same decoder row.
    each = transcoder_set(model, activation="relu", skip_connection=False, normalization="standardize")
    source = transcoder.sources[0]
    with torch.no_grad():
        for number, one in enumerate(each.values()):
            one.W_dec[3] = source.W_dec[3, number]
    edits = [FeatureEdit(one, 3, position=5, kind="steer", value=2.0) for one in each]
    expected = measure_effect(model, each, ids, edits, mode=mode, logits_to_keep=0)
    torch.testing.assert_close(effect.logits_after, expected.logits_after, rtol=1e-4, atol=1e-4)
    first = measure_effect(model, each, ids, edits[:1], mode=mode, logits_to_keep=0)
    assert (effect.logits_after - first.logits_after).abs().max() > 1e-2


def test_an_ablation_has_the_effect_that_its_edge_predicts():
    model = tiny_model("gpt2")
    transcoder, ids = random_cross_layer(model), tiny_tokens(1, 8)
    graph = attribution_graph(model, transcoder, ids[0].tolist(), max_logits=2, progress=False)
    is_edge = graph.is_kind("feature")[graph.source] & graph.is_kind("target")[graph.target]
    edges = is_edge.nonzero()[:, 0]
    for edge in edges[graph.weight[edges].abs().topk(6).indices].tolist():
        node, target = graph.node(int(graph.source[edge])), graph.node(int(graph.target[edge]))
        edit = FeatureEdit(node.dictionary, node.index, position=node.position)
        effect = measure_effect(model, transcoder, ids, [edit], mode="direct")
        change = (effect.logits_after - effect.logits_before)[0, -1]
        token = graph.targets[target.index].token_id
        assert float(change[token] - change.mean()) == pytest.approx(-float(graph.weight[edge]), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_contributions_of_paths_sum(family):
    model = tiny_model(family)
    (run,) = record(model, random_cross_layer(model), [tiny_tokens(1, 8)[0]])
    targets, _ = some_functionals(run)
    targets = targets[torch.tensor([row for row, point in enumerate(targets.point) if point == "final"])]
    expander = Expander(run)
    reads = expander.read(run.num_layers, "final", targets.position, targets.vector, targets.bias)
    found, sums = expander.expand(reads)
    totals = measured(run, targets)
    assert ((sums.sum(1) - totals).abs() <= 1e-4 * totals.abs().max()).all()
    # A feature of the first layer contributes through the site of every layer.
    assert found[found.dictionary == 0].layer.unique().tolist() == list(range(NUM_LAYERS))
    following = found[found.continues]
    assert len(expander.follow(following, reads)) == len(following)


def test_feature_weights_add_up_the_sites_that_come_before():
    model = tiny_model("gpt2")
    transcoder = random_cross_layer(model)
    first, second, third = list(transcoder)[:3]
    weights = FeatureWeights(model, transcoder)
    rows = [decoder_rows(transcoder[first], site=site) for site in transcoder[first].config.output_sites]
    torch.testing.assert_close(weights.writes(first), sum(rows))
    for target, sites in ((second, 1), (third, 2)):
        strengths = weights.connections(first, target, target_features=[2, 5])
        torch.testing.assert_close(strengths, sum(rows[:sites]) @ weights.reads(target, [2, 5]).T)
    # The heads of layer 1 read what layer 0 wrote there, and not yet what it writes in layer 1.
    through = weights.connections(first, third, target_features=[2], through=(1, 0))
    pulled = weights.pulled(third, [2], (1, 0))
    torch.testing.assert_close(through, rows[0] @ pulled.T, rtol=1e-4, atol=1e-5)
    assert len(weights.top_connections(first, second, k=4).strengths) == 4


def test_promoted_tokens_are_those_of_all_sites():
    model, count = tiny_model("gpt2"), 5
    transcoder = random_cross_layer(model)
    source = transcoder.sources[0]
    written = sum(decoder_rows(source, site=site) for site in source.config.output_sites)
    weights = direct_logits(model, written).double()
    expected = ((weights - weights.mean(0)) / weights.std(0, correction=0))[3].topk(count)

    class Tokenizer:
        def convert_ids_to_tokens(self, ids):
            return [str(number) for number in ids]

        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids if isinstance(ids, list) else [int(ids)]))

        def batch_decode(self, rows, **kwargs):
            return [self.decode(row) for row in rows]

    promoted, _ = promoted_tokens(model, source, [3], Tokenizer(), count)
    assert [value for _, value in promoted[0]] == pytest.approx(expected.values.tolist(), rel=1e-4)


def test_two_cross_layer_transcoders_do_not_share_a_site():
    model = tiny_model("gpt2")
    one, other = random_cross_layer(model), random_cross_layer(model)
    both = {**dict(one.items()), **{f"other {name}": layer for name, layer in other.items()}}
    with pytest.raises(TranscoderError, match="Two dictionaries write to"):
        splice(model, both.values())
    with pytest.raises(TranscoderError, match="write to one place"):
        record(model, both, [tiny_tokens(1, 8)[0]])


def test_a_configuration_for_a_model_names_all_layers():
    config = CrossLayerTranscoderConfig.for_model(tiny_model("gpt2"), num_features=8, k=2)
    assert config.num_sources == NUM_LAYERS and config.input_sites[1] == "layers.1.mlp.in"
    with pytest.raises(TranscoderError, match="CrossLayerTranscoderConfig has no argument kk"):
        CrossLayerTranscoderConfig.for_model(tiny_model("gpt2"), kk=2)
