"""Graphs, paths and attributions warn where their rows do not sum, and not where they are only rounded."""

import json

import pytest
import torch

from hf_transcoders import register_architecture
from hf_transcoders.circuits import attribution_graph, contrast, greedy_paths, union
from hf_transcoders.circuits.graphs import AttributionGraph, head_loadings, qk_attribution
from hf_transcoders.circuits.graphs.graph_card import graph_card
from hf_transcoders.circuits.graphs.row_sums import relative_tolerance
from hf_transcoders.circuits.graphs.viewer import viewer_graph
from hf_transcoders.circuits.interventions import intervene
from hf_transcoders.lm import architectures
from tests.circuits.graphs.random_graph import random_graph
from tests.circuits.interventions.setups import random_dictionary
from tests.tiny_models import TINY_CONFIGS, tiny_model, tiny_tokens


PROMPT = tiny_tokens(1, 9)[0].tolist()
SAID = "do not sum to the measured values"


@pytest.fixture
def said(monkeypatch):
    """The warnings that are logged about rows."""
    sentences = []
    monkeypatch.setattr("hf_transcoders.circuits.graphs.row_sums.logger.warning", sentences.append)
    return sentences


def dictionaries_of(model):
    return [random_dictionary(model, f"layers.{at}.mlp.in", f"layers.{at}.mlp.branch", seed=at) for at in (0, 2)]


def graph_of(model):
    return attribution_graph(model, dictionaries_of(model), PROMPT, progress=False)


def steered(model, module, size=1.0):
    """A hook unknown to the library, as steering libraries add them."""
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0)).to(model.dtype) * size

    def add(module, args, output):
        return (output[0] + direction, *output[1:]) if isinstance(output, tuple) else output + direction

    module.register_forward_hook(add)
    return model


@pytest.mark.parametrize("family", TINY_CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_reason_for_a_warning(family, dtype, said):
    graph = graph_of(tiny_model(family).to(dtype))
    assert graph.warning is None and graph.metadata["warning"] is None and not said
    # Well below, so that the arithmetic of another machine does not change the result.
    flow = (graph.influence() + graph.target_weights)[graph.expanded]
    errors = graph.row_errors()[graph.expanded]
    assert (errors * flow).sum() / flow.sum() < 0.5 * relative_tolerance(str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    "place",
    [
        lambda model: model.model.layers[0],
        lambda model: model.model.layers[2],
        lambda model: model.model.layers[1].self_attn,
        lambda model: model.model.embed_tokens,
        lambda model: model.model.layers[1].input_layernorm,
        lambda model: model.model.norm,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hook_that_is_not_known(place, dtype, said):
    model = tiny_model("llama").to(dtype)
    found = graph_of(steered(model, place(model), size=0.0))
    assert found.warning is None and not said
    # The embedding is measured after its hook, so that it remains a source like any other.
    if place(model) is model.model.embed_tokens:
        return
    found = graph_of(steered(model, place(model)))
    assert SAID in found.warning and said == [found.warning]


def test_an_architecture_that_is_wrong(said):
    """Gemma's names without its norm after attention."""
    known = architectures._ARCHITECTURES["gemma3_text"]
    try:
        from dataclasses import replace

        register_architecture("gemma3_text", replace(known, attention_post_norm=None))
        assert SAID in graph_of(tiny_model("gemma3_text")).warning
    finally:
        register_architecture("gemma3_text", known)


def test_a_graph_of_numbers_that_are_none():
    graph = random_graph()
    graph.total[graph.is_kind("target")] = float("nan")
    assert SAID in graph.warning


def test_it_is_said_wherever_the_graph_goes(tmp_path, said):
    model = tiny_model("llama")
    graph = graph_of(steered(model, model.model.layers[0]))
    graph.save_pretrained(tmp_path)
    assert SAID in json.loads((tmp_path / "graph.json").read_text())["metadata"]["warning"]
    loaded = AttributionGraph.from_pretrained(tmp_path)
    # The warning comes from the numbers, not from the file.
    loaded.metadata["warning"] = None
    for one in (graph, loaded, loaded.prune(0.9, 0.9), union([graph, graph]), contrast(graph, graph)):
        assert SAID in one.warning
        said.clear()
        one.scores()
        assert said == [one.warning]
        page = one.to_html(tmp_path / "graph.html").read_text()
        assert 'role="alert"' in page and page.count(SAID) >= 1
        assert f"> [!WARNING]\n> {one.warning[:20]}" in graph_card(one, "me/graph")
        assert SAID in viewer_graph(one, "slug")["metadata"]["info"]["description"]
    good = random_graph()
    assert 'role="alert"' not in good.to_html(tmp_path / "good.html").read_text()
    assert "WARNING" not in graph_card(good, "me/graph")


def test_paths_loadings_and_scores_of_heads(said):
    model = tiny_model("llama")
    dictionaries = dictionaries_of(model)
    for warned in (False, True):
        if warned:
            steered(model, model.model.layers[0])
        graph = graph_of(model)
        found = [
            greedy_paths(model, dictionaries, PROMPT),
            qk_attribution(model, dictionaries, PROMPT, 2, 1),
            head_loadings(model, dictionaries, graph, max_edges=4),
        ]
        texts = [str(found[0]), found[1].to_text(), found[2].to_text()]
        assert all((each.warning is not None) == warned for each in found)
        assert all(("WARNING" in text) == warned for text in texts)
        assert (found[0].to_dict()["warning"] is not None) == (found[1].to_dict()["warning"] is not None) == warned
    assert len(said) >= 4


@pytest.mark.parametrize("family", TINY_CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_paths_and_scores(family, dtype, said):
    model = tiny_model(family).to(dtype)
    greedy_paths(model, dictionaries_of(model), PROMPT, num_paths=8)
    qk_attribution(model, dictionaries_of(model), PROMPT, 2, 1)
    assert not said


def test_our_own_edits_count_as_hooks(said):
    """A graph within an intervention describes the changed model, with the change as an error."""
    from hf_transcoders.circuits import FeatureEdit

    model = tiny_model("llama")
    dictionary = dictionaries_of(model)[0]
    edit = FeatureEdit(dictionary.config.output_site, 3, position="all", kind="steer", value=5.0)
    with intervene(model, dictionary, [edit]):
        graph_of(model)
    # Writes at the site of a dictionary are part of its error.
    assert not said
