"""The JSON of published viewers, checked against its known schema."""

import json
import math
import re

import pytest

from hf_transcoders.circuits.graphs.viewer import cantor, viewer_graph
from hf_transcoders.circuits.graphs.viewer_files import feature_json, write_viewer_files
from hf_transcoders.errors import TranscoderError
from hf_transcoders.features.feature_examples import FeatureContext, FeatureExplanation

from .random_graph import random_graph


# Name -> types, required. Of Neuronpedia's validator and of the first viewer, as published.
SCHEMA = {
    "graph": {"metadata": (dict, True), "qParams": (dict, True), "nodes": (list, True), "links": (list, True)},
    "metadata": {
        "slug": (str, True),
        "scan": ((str, list), True),
        "prompt_tokens": (list, True),
        "prompt": (str, True),
        "transcoder_list": (list, False),
        "node_threshold": (float, False),
        "schema_version": (int, False),
        "feature_details": (dict, False),
        "info": (dict, False),
        "generation_settings": (dict, False),
        "pruning_settings": (dict, False),
        "replacement_score": (float, False),
        "completeness_score": (float, False),
    },
    "qParams": {
        "pinnedIds": (list, False),
        "supernodes": (list, False),
        "linkType": (str, False),
        "clickedId": (str, False),
        "sg_pos": (str, False),
    },
    "node": {
        "node_id": (str, True),
        "feature": ((int, type(None)), True),
        "layer": ((str, int), True),
        "ctx_idx": (int, True),
        "feature_type": (str, True),
        "jsNodeId": (str, True),
        "clerp": (str, True),
        "influence": ((float, type(None)), False),
        "activation": ((float, type(None)), False),
        "token_prob": (float, False),
        "is_target_logit": (bool, False),
        "run_idx": (int, False),
        "reverse_ctx_idx": (int, False),
    },
    "link": {"source": (str, True), "target": (str, True), "weight": (float, True)},
    "feature": {
        "index": (int, True),
        "examples_quantiles": (list, True),
        "top_logits": (list, True),
        "bottom_logits": (list, True),
        "act_min": (float, False),
        "act_max": (float, False),
        "activation_frequency": (float, False),
        "transcoder_id": (str, False),
    },
    "example": {
        "tokens": (list, True),
        "tokens_acts_list": (list, True),
        "train_token_ind": (int, True),
        "is_repeated_datapoint": (bool, True),
    },
}
TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit", "bias", "unknown"}


def check(value, name):
    schema = SCHEMA[name]
    assert isinstance(value, dict) and not value.keys() - schema.keys(), f"{name}: {value.keys() - schema.keys()}"
    for key, (types, required) in schema.items():
        assert key in value or not required, f"{name} has no {key}"
        if key in value:
            assert isinstance(value[key], types), f"{name}.{key}: {value[key]!r}"


def check_graph(data):
    data = json.loads(json.dumps(data, allow_nan=False))
    check(data, "graph")
    check(data["metadata"], "metadata")
    check(data["qParams"], "qParams")
    ids = [node["node_id"] for node in data["nodes"]]
    assert len(ids) == len(set(ids))
    tokens = len(data["metadata"]["prompt_tokens"])
    for node in data["nodes"]:
        check(node, "node")
        assert node["feature_type"] in TYPES and 0 <= node["ctx_idx"] < tokens and 0 <= node["influence"] <= 1
    for link in data["links"]:
        check(link, "link")
        assert link["source"] in set(ids) and link["target"] in set(ids) and math.isfinite(link["weight"])
    assert set(data["qParams"]["pinnedIds"]) <= set(ids)
    return data


@pytest.fixture
def graph():
    return random_graph(difference=True, metadata={"model": "org/tiny model"})


def explained(graph, name, count=2):
    number = graph.dictionaries.index(name)
    indices = sorted(set(graph.index[graph.is_kind("feature") & (graph.dictionary == number)].tolist()))[:count]
    context = FeatureContext([" a", " pea\nk", " b"], [0.5, 3.0, 0.0], 1, 0, 7)
    return [FeatureExplanation(i, 0.01, 3.0, 1.0, [context], [(" up", 2.0)], [(" down", -1.0)]) for i in indices]


def test_the_schema(graph):
    data = check_graph(viewer_graph(graph, "a-prompt"))
    assert len(data["nodes"]) == graph.num_nodes and len(data["links"]) == graph.num_edges
    metadata = data["metadata"]
    assert metadata["schema_version"] == 1 and metadata["scan"] == "tiny-model" and metadata["slug"] == "a-prompt"
    assert metadata["generation_settings"] == {
        "max_n_logits": 10,
        "desired_logit_prob": 0.95,
        "max_feature_nodes": 2048,
    }
    assert metadata["replacement_score"] == pytest.approx(graph.scores()["replacement"])
    pruned = check_graph(viewer_graph(graph.prune(0.7, 0.9), "pruned"))
    assert pruned["metadata"]["pruning_settings"] == {"node_threshold": 0.7, "edge_threshold": 0.9}


def test_every_kind_of_node(graph):
    data = check_graph(viewer_graph(graph, "a-prompt"))
    by_number = data["nodes"]
    sae = graph.dictionaries.index("layers.1.attn.sae")
    for number, node in enumerate(by_number):
        ours = graph.node(number)
        if ours.kind == "feature":
            assert node["feature_type"] == "cross layer transcoder" and node["layer"] == str(ours.layer)
            # Layer 1 has two dictionaries, whose features must not be mixed up.
            feature = 2 * ours.index + (ours.dictionary == graph.dictionaries[sae]) if ours.layer == 1 else ours.index
            assert node["node_id"] == f"{ours.layer}_{feature}_{ours.position}"
            s = ours.layer + feature
            assert node["feature"] == s * (s + 1) // 2 + feature and node["jsNodeId"] == f"{ours.layer}_{feature}-0"
        elif ours.kind == "error":
            rank = 2 if ours.dictionary == graph.dictionaries[sae] else 1
            assert node["node_id"] == f"{ours.layer}_-{rank}_{ours.position}" and node["feature"] == -1
        elif ours.kind == "mlp":
            assert (node["node_id"], node["feature_type"]) == (f"3_-1_{ours.position}", "mlp reconstruction error")
        elif ours.kind == "token":
            assert node["node_id"] == f"E_{ours.index}_{ours.position}" and node["layer"] == "E"
            assert node["feature"] == ours.position and node["feature_type"] == "embedding"
        elif ours.kind == "target":
            target = graph.targets[ours.index]
            token = -4 if target.token_id is None else target.token_id
            assert (
                node["node_id"] == f"5_{token}_{ours.position}" and node["layer"] == "5" and node["feature"] == token
            )
            label, probability = re.fullmatch(r'Output "(.*)" \(p=(\d\.\d{3})\)', node["clerp"]).groups()
            assert label == target.label and float(probability) == pytest.approx(target.weight, abs=6e-4)
    logits = [node for node in by_number if node["feature_type"] == "logit"]
    best = max(range(3), key=lambda i: graph.targets[i].probability)
    assert [node["is_target_logit"] for node in logits] == [i == best for i in range(4)]
    assert sum(node["is_target_logit"] for node in by_number) == 1


def test_influence_is_the_share_of_all_that_matter_as_much(graph):
    nodes = viewer_graph(graph, "a")["nodes"]
    influence = graph.influence()
    number = int(influence.argsort(descending=True)[2])
    share = influence[influence >= influence[number]].sum() / influence.sum()
    assert nodes[number]["influence"] == pytest.approx(float(share))


def test_a_label_that_could_break_the_viewer():
    graph = random_graph(targets=1)
    graph.targets[0] = type(graph.targets[0])(' x" (p=0.9)\n', 5, 1.0, 0.25, 7)
    (logit,) = [node for node in viewer_graph(graph, "a")["nodes"] if node["feature_type"] == "logit"]
    assert logit["clerp"].split("(p=")[1] == "0.250)" and "\n" not in logit["clerp"]


def test_files_of_several_graphs(graph, tmp_path):
    # Pruned so far that one of layer 1's dictionaries has no node left: numbers must still match the feature files.
    alone = graph.select(~(graph.dictionary == graph.dictionaries.index("layers.1.attn.sae")))
    name = "layers.1.mlp.transcoder"
    features = {name: explained(graph, name)}
    write_viewer_files(tmp_path / "viewer", {"one": graph, "two": alone}, features)
    overview = json.loads((tmp_path / "viewer/data/graph-metadata.json").read_text())
    assert [entry["slug"] for entry in overview["graphs"]] == ["one", "two"]
    for slug in ("one", "two"):
        data = check_graph(json.loads((tmp_path / f"viewer/graph_data/{slug}.json").read_text()))
        assert data["metadata"] in overview["graphs"]
        numbers = {node["feature"] for node in data["nodes"] if node["clerp"] == " pea⏎k"}
        files = {int(path.stem) for path in (tmp_path / "viewer/features/tiny").iterdir()}
        assert numbers == files == {cantor(1, 2 * explanation.feature) for explanation in features[name]}
        for number in files:
            content = json.loads((tmp_path / f"viewer/features/tiny/{number}.json").read_text())
            check(content, "feature")
            assert content["index"] == number and content["act_max"] == 3.0 and content["top_logits"] == [" up"]
            for quantile in content["examples_quantiles"]:
                assert isinstance(quantile["quantile_name"], str)
                for example in quantile["examples"]:
                    check(example, "example")
                    assert len(example["tokens"]) == len(example["tokens_acts_list"]) > example["train_token_ind"]


def test_cantor_numbers_are_unique():
    pairs = [(layer, feature) for layer in range(40) for feature in range(200)]
    assert len({cantor(*pair) for pair in pairs}) == len(pairs)


def test_a_feature_that_never_fired():
    content = feature_json(FeatureExplanation(3, 0.0, 0.0, 0.0, [], [], []), 9, "a")
    check(content, "feature")
    assert content["examples_quantiles"][0]["examples"] == []


def test_the_method_writes_a_file(graph, tmp_path):
    path = graph.to_viewer_json(tmp_path / "ioi.json", scan="gpt2")
    assert check_graph(json.loads(path.read_text()))["metadata"]["slug"] == "ioi"


@pytest.mark.parametrize("slug, scan", [("../up", None), ("", None), ("a b", None), ("a", "x/y")])
def test_names_that_are_no_files(graph, tmp_path, slug, scan):
    with pytest.raises(TranscoderError, match="use letters"):
        write_viewer_files(tmp_path / "viewer", {slug: graph}, scan=scan)
    assert not list(tmp_path.iterdir())


def test_other_mistakes_write_nothing(graph, tmp_path):
    with pytest.raises(TranscoderError, match="no graph"):
        write_viewer_files(tmp_path / "viewer", {})
    with pytest.raises(TranscoderError, match="other dictionaries"):
        write_viewer_files(tmp_path / "viewer", {"a": graph, "b": random_graph(num_layers=3)})
    with pytest.raises(TranscoderError, match="no dictionary 'nope'"):
        write_viewer_files(tmp_path / "viewer", {"a": graph}, {"nope": []})
    assert not list(tmp_path.iterdir())


def test_features_of_an_unknown_dictionary_are_refused(graph):
    with pytest.raises(TranscoderError, match="has no dictionary 'nope'"):
        viewer_graph(graph, "slug", features={"nope": []})
