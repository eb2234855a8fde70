"""Trees of features: ablations against whole forward passes, edges against their graph, and a planted chain."""

import json

import pytest
import torch

from hf_transcoders import TranscoderError
from hf_transcoders.circuits import FeatureEdit, Target, attribution_graph, measure_effect
from hf_transcoders.studies.feature_tree.feature_ablation import ablation_drops
from hf_transcoders.studies.feature_tree.study import dictionary_before, feature_tree_study
from hf_transcoders.studies.feature_tree.target_edges import target_edges
from hf_transcoders.studies.feature_tree.tree_report import save_feature_tree
from tests.studies.feature_patching.test_feature_patching import sae_of
from tests.studies.greater_than.setups import transcoder_of
from tests.studies.test_circuit_reuse import TOKENIZER, model_for_tasks


ROWS = [
    {"input_ids": row.tolist()} for row in torch.randint(3, 128, (10, 8), generator=torch.Generator().manual_seed(0))
]


@pytest.fixture(scope="module")
def model():
    return model_for_tasks("llama").eval()


@pytest.fixture(scope="module")
def transcoders(model):
    return {f"t{layer}": transcoder_of(model, layer) for layer in range(3)}


@pytest.mark.parametrize("batch_size", [64, 5])
@pytest.mark.parametrize("kind", ["transcoder", "sae"])
def test_drops_equal_single_interventions(model, transcoders, kind, batch_size):
    source = transcoders["t1"] if kind == "transcoder" else sae_of(model, "layers.0.resid_post")
    target = transcoders["t2"]
    tokens = torch.tensor(ROWS[3]["input_ids"])
    features, drops = ablation_drops(model, source, target, 5, tokens, skip_first=1, batch_size=batch_size)
    assert len(features) > 8 and drops.abs().max() > 1e-3
    edits = [[FeatureEdit("source", int(feature), slice(1, None))] for feature in features]
    effect = measure_effect(model, {"source": source, "target": target}, tokens, edits, read=[("target", 5, -1)])
    expected = (effect.activations_before - effect.activations_after)[:, 0]
    torch.testing.assert_close(drops, expected, rtol=1e-3, atol=1e-5)


def test_the_closest_earlier_dictionary_is_the_one_before(model, transcoders):
    found = {name: dictionary_before(model, transcoders, name) for name in transcoders}
    assert found == {"t0": None, "t1": "t0", "t2": "t1"}
    named = {
        **transcoders,
        "sae": sae_of(model, "layers.1.resid_post"),
        "before": sae_of(model, "layers.0.resid_post"),
    }
    assert dictionary_before(model, named, "sae") in ("t1", "before")
    assert dictionary_before(model, {"sae": named["sae"], "before": named["before"]}, "sae") == "before"
    assert dictionary_before(model, {"sae": named["sae"]}, "sae") is None


def test_a_planted_chain_is_the_tree(model, transcoders):
    """Feature 3 of layer 0 writes what feature 7 of layer 1 reads, and that what feature 2 of layer 2 reads."""
    with torch.no_grad():
        planted = {name: transcoder_of(model, layer, seed=layer) for layer, name in enumerate(transcoders)}
        for name, row in (("t0", 3), ("t1", 7)):
            planted[name].W_dec.mul_(0.01)
            planted[name].W_dec[row] = torch.randn(
                planted[name].config.d_out, generator=torch.Generator().manual_seed(row)
            )
        for name, row, (source, feature) in (("t1", 7, ("t0", 3)), ("t2", 2, ("t1", 7))):
            planted[name].W_enc[row] = 3 * planted[source].W_dec[feature] / planted[source].W_dec[feature].norm()
    tree = feature_tree_study(model, planted, ROWS, TOKENIZER, "t2", 2, num_children=2, progress=False)
    child = tree.root.children[0]
    assert (child.dictionary, child.feature) == ("t1", 7)
    assert (child.children[0].dictionary, child.children[0].feature) == ("t0", 3)
    assert child.drop > 10 * abs(tree.root.children[1].drop if len(tree.root.children) > 1 else 0)
    assert child.drop_share > 0.1 and child.edge > 0
    assert tree.root.compared > 8 and tree.root.contexts > 1


def test_edges_are_those_of_the_graph(model, transcoders):
    contexts = [torch.tensor(ROWS[row]["input_ids"][:length]) for row, length in ((0, 8), (1, 5))]
    named = {name: transcoders[name] for name in ("t1", "t2")}
    found = target_edges(model, named, "t1", "t2", 4, contexts)
    expected = torch.zeros_like(found)
    for context in contexts:
        graph = attribution_graph(
            model, named, context.tolist(), targets=[Target.pre_activation("t2", 4)], progress=False
        )
        wanted = graph.is_kind("target")[graph.target] & graph.is_kind("feature")[graph.source]
        wanted &= graph.dictionary[graph.source] == graph.dictionary_number("t1")
        for source, weight in zip(graph.source[wanted].tolist(), graph.weight[wanted].tolist(), strict=True):
            expected[graph.node(source).index] += weight / 2
    assert expected.count_nonzero() > 5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_edges_with_nothing_between_predict_the_drops(model):
    """The second dictionary reads the stream that the first has just written to: nothing is between them."""
    named = {"one": transcoder_of(model, 1), "two": sae_of(model, "layers.1.resid_post")}
    with torch.no_grad():
        named["one"].W_dec.mul_(1e-3)
    tree = feature_tree_study(model, named, ROWS, TOKENIZER, "two", 4, depth=1, progress=False)
    assert tree.root.spearman > 0.95 and tree.root.p_value < 0.01


def test_text_page_and_what_is_refused(model, transcoders, tmp_path):
    tree = feature_tree_study(model, transcoders, ROWS, TOKENIZER, "t1", 2, num_contexts=2, progress=False)
    assert "Spearman" in tree.to_text() and "· t0" in tree.to_text()
    page = save_feature_tree(tree, tmp_path / "out").read_text()
    assert "strongest context" in page
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["root"]["feature"] == 2 and len(saved["root"]["children"]) == len(tree.root.children)
    with pytest.raises(TranscoderError, match="No dictionary writes before 't0' reads"):
        feature_tree_study(model, transcoders, ROWS, TOKENIZER, "t0", 2, progress=False)
    silent = {"t0": transcoders["t0"], "t1": transcoder_of(model, 1)}
    with torch.no_grad():
        silent["t1"].b_enc[2] = -1e6
    with pytest.raises(TranscoderError, match="never active"):
        feature_tree_study(model, silent, ROWS, TOKENIZER, "t1", 2, progress=False)
