"""The JSON of published viewers, checked against its schema.

The schema is a description of our own: which fields the pydantic models of circuit-tracer 0.5.0 and the JSON schema of
Neuronpedia know and require. `tests/interop/test_circuit_tracer.py` checks against the models and the client themselves.
"""

import dataclasses
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch

from hf_transcoders.circuits.graphs import viewer_files
from hf_transcoders.circuits.graphs.combine import union
from hf_transcoders.circuits.graphs.node_ids import LayerNumbers, node_ids
from hf_transcoders.circuits.graphs.viewer import cantor, viewer_graph
from hf_transcoders.circuits.graphs.viewer_files import feature_json, write_viewer_files
from hf_transcoders.errors import TranscoderError
from hf_transcoders.features.activation_histograms import ActivationHistogram, RunningHistograms
from hf_transcoders.features.feature_examples import FeatureContext, FeatureExplanation

from .random_graph import random_graph


# Name -> types, required.
SCHEMA = {
    "graph": {"metadata": (dict, True), "qParams": (dict, True), "nodes": (list, True), "links": (list, True)},
    "metadata": {
        "slug": (str, True),
        "scan": (str, True),
        "prompt_tokens": (list, True),
        "prompt": (str, True),
        "transcoder_list": (list, True),
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
        "act_min": (float, True),
        "act_max": (float, True),
        "activation_frequency": (float, True),
        "quantile_values": (list, True),
        "histogram": (list, True),
        "transcoder_id": (str, True),
    },
    "example": {
        "tokens": (list, True),
        "tokens_acts_list": (list, True),
        "train_token_ind": (int, True),
        "is_repeated_datapoint": (bool, True),
    },
}
REQUIRED_BY_CLIENT = {"index", "transcoder_id", "examples_quantiles", "top_logits", "bottom_logits"}
# Those that the client of circuit-tracer draws as something.
TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


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
        known = TYPES if data["metadata"]["scan"].startswith("./") else TYPES | {"bias"}
        assert node["feature_type"] in known and 0 <= node["ctx_idx"] < tokens and 0 <= node["influence"] <= 1
    for link in data["links"]:
        check(link, "link")
        assert link["source"] in set(ids) and link["target"] in set(ids) and math.isfinite(link["weight"])
    assert set(data["qParams"]["pinnedIds"]) <= set(ids)
    drawn = drawn_by_the_client(data)
    assert len(drawn) == len(ids)
    return data


def drawn_by_the_client(data, threshold=None):
    """Ids of the nodes that the client of circuit-tracer 0.5.0 draws, at its slider's maximum by default."""
    threshold = data["metadata"]["node_threshold"] if threshold is None else threshold
    nodes = [
        node
        for node in data["nodes"]
        if node["feature_type"] in ("embedding", "logit") or node["influence"] <= threshold
    ]
    # It counts nodes by what they have in common, and hides those that make up most of the tokens.
    same = Counter(
        (node["layer"], node["feature"], node["ctx_idx"], "error" in node["feature_type"]) for node in nodes
    )
    most = len(data["metadata"]["prompt_tokens"]) * 2 / 3
    assert max(same.values()) == 1, "two nodes would be taken for one"
    # It has no place for nodes at a first position that is the only one.
    return [node["node_id"] for node in nodes if most >= 1 and max(node["ctx_idx"] for node in nodes) > 0]


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
    assert (
        metadata["schema_version"] == 1
        and metadata["scan"] == "./data/features/tiny-model"
        and metadata["slug"] == "a-prompt"
    )
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
            assert node["node_id"] == f"{ours.layer}_-{rank}_{ours.position}" and node["feature"] == -rank
        elif ours.kind == "mlp":
            assert (node["node_id"], node["feature_type"]) == (f"3_-1_{ours.position}", "mlp reconstruction error")
        elif ours.kind == "token":
            assert node["node_id"] == f"E_{ours.index}_{ours.position}" and node["layer"] == "E"
            assert node["feature"] == ours.position and node["feature_type"] == "embedding"
        elif ours.kind == "position":
            assert node["feature_type"] == "embedding" and node["layer"] == "E"
            assert node["feature"] == -1 - ours.position
        elif ours.kind == "bias":
            # A circle would be a feature.
            assert node["feature_type"] == "mlp reconstruction error" and node["feature"] < -1
            assert node["clerp"] == graph.label(number)
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
    graph.targets[0] = type(graph.targets[0])("<|end|>", 5, 1.0, 0.25, 7)
    (logit,) = [node for node in viewer_graph(graph, "a")["nodes"] if node["feature_type"] == "logit"]
    # Its tooltips are HTML.
    assert logit["clerp"] == 'Output "‹|end|›" (p=0.250)'


def listed(folder):
    return {entry["slug"]: entry for entry in json.loads((folder / "graph-metadata.json").read_text())["graphs"]}


def test_files_of_several_graphs(graph, tmp_path):
    # Pruned so far that one of layer 1's dictionaries has no node left: numbers must still match the feature files.
    alone = graph.select(~(graph.dictionary == graph.dictionaries.index("layers.1.attn.sae")))
    name = "layers.1.mlp.transcoder"
    features = {name: explained(graph, name)}
    folder = write_viewer_files(tmp_path / "viewer", {"one": graph, "two": alone}, features)
    (place,) = (folder / "features").iterdir()
    assert place.name.startswith("tiny-model-")
    # Flat, as the server maps `/data/` and `/graph_data/` onto the folder.
    assert {path.name for path in folder.iterdir()} == {"graph-metadata.json", "one.json", "two.json", "features"}
    for slug in ("one", "two"):
        data = check_graph(json.loads((folder / f"{slug}.json").read_text()))
        assert data["metadata"] == listed(folder)[slug] and data["metadata"]["scan"] == f"./data/features/{place.name}"
        numbers = {node["feature"] for node in data["nodes"] if node["clerp"].startswith("“")}
        assert numbers == {cantor(1, 2 * explanation.feature) for explanation in features[name]}
        for node in data["nodes"]:
            if node["feature_type"] != "cross layer transcoder":
                continue
            content = json.loads((place / f"{node['feature']}.json").read_text())
            assert content["index"] == node["feature"]
            if node["feature"] not in numbers:
                # Nothing was measured, and nothing is claimed.
                assert content.keys() == REQUIRED_BY_CLIENT and not content["examples_quantiles"][0]["examples"]
                continue
            check(content, "feature")
            assert content["act_max"] == 3.0 and content["top_logits"] == [" up"]
            for quantile in content["examples_quantiles"]:
                assert isinstance(quantile["quantile_name"], str)
                for example in quantile["examples"]:
                    check(example, "example")
                    assert len(example["tokens"]) == len(example["tokens_acts_list"]) > example["train_token_ind"]


def test_the_histogram_of_a_feature():
    # 300 activations of 0.5, 1.0 ... 150, planted.
    values = np.arange(1, 301) / 2
    running = RunningHistograms(1, torch.device("cpu"))
    found = torch.zeros(300, dtype=torch.long), torch.tensor(values).float()
    running.widen(*found)
    running.count(*found)
    explanation = FeatureExplanation(3, 0.01, 150.0, 75.25, [], [], [], histogram=running.histogram(0))
    content = feature_json(explanation, 9, "a")
    check(content, "feature")
    # 128 bins up to 256, without the empty ones, so two wide: four values each.
    expected, _ = np.histogram(values, bins=75, range=(0.01, 150.01))
    assert content["histogram"] == expected.tolist() == [4] * 75
    assert content["act_min"] == 0 and content["act_max"] == 150.0
    percentiles = np.percentile(values, range(1, 101))
    assert len(content["quantile_values"]) == 100 and content["quantile_values"][-1] == 150.0
    assert content["quantile_values"] == pytest.approx(percentiles.tolist(), abs=2.0)


def test_graphs_of_several_runs_share_a_folder(graph, tmp_path):
    name, folder = "layers.1.mlp.transcoder", tmp_path / "viewer"
    write_viewer_files(folder, {"one": graph}, {name: explained(graph, name)})
    first = listed(folder)["one"]["scan"].split("/")[-1]
    other = random_graph(num_layers=3, seed=1, metadata={"model": "another"})
    write_viewer_files(folder, {"two": other})
    assert list(listed(folder)) == ["one", "two"] and (folder / "features" / first).is_dir()
    # A list that the client itself, or circuit-tracer, has written to keeps its entries.
    content = json.loads((folder / "graph-metadata.json").read_text())
    content["graphs"].append(
        {"slug": "theirs", "scan": "./data/features/theirs", "prompt": "x", "title_prefix": "new"}
    )
    (folder / "graph-metadata.json").write_text(json.dumps(content))
    # The same slug is replaced, with its features.
    write_viewer_files(folder, {"one": graph.prune(0.5)}, {name: explained(graph, name, 1)})
    assert sorted(listed(folder)) == ["one", "theirs", "two"] and listed(folder)["theirs"]["title_prefix"] == "new"
    assert listed(folder)["one"]["node_threshold"] == 0.5
    places = {listed(folder)[slug]["scan"].split("/")[-1] for slug in ("one", "two")}
    assert first not in places and {path.name for path in (folder / "features").iterdir()} == places
    for slug in ("one", "two"):
        check_graph(json.loads((folder / f"{slug}.json").read_text()))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"graphs": 3}', '{"graphs": [3]}', '{"graphs": [{"prompt": "x"}]}', '{"graphs": [{"slug": 1}]}'],
)
def test_a_damaged_list_is_refused(graph, tmp_path, text):
    (tmp_path / "graph-metadata.json").write_text(text)
    with pytest.raises(TranscoderError, match=r"repair or remove graph-metadata\.json, or choose another folder\.$"):
        write_viewer_files(tmp_path, {"one": graph})
    assert [path.name for path in tmp_path.iterdir()] == ["graph-metadata.json"]
    assert (tmp_path / "graph-metadata.json").read_text() == text


def test_another_process_that_writes_meanwhile_loses_nothing(graph, tmp_path, monkeypatch):
    write_viewer_files(tmp_path, {"one": graph})
    read = viewer_files._listed

    def interrupted(path):
        found = read(path)
        monkeypatch.undo()
        write_viewer_files(tmp_path, {"two": graph})
        return found

    monkeypatch.setattr(viewer_files, "_listed", interrupted)
    with pytest.raises(TranscoderError, match="do it again"):
        write_viewer_files(tmp_path, {"three": graph})
    assert list(listed(tmp_path)) == ["one", "two"] and not (tmp_path / "three.json").exists()


def test_influence_is_that_of_the_whole_graph(graph, tmp_path):
    """Pruning must not hide what it keeps, and the slider must mean what it means for circuit-tracer."""
    pruned = graph.prune(0.7, 0.9)
    pruned.save_pretrained(tmp_path)
    for each in (pruned, type(graph).from_pretrained(tmp_path)):
        data = check_graph(viewer_graph(each, "pruned"))
        assert data["metadata"]["node_threshold"] == 0.7
        assert data["metadata"]["pruning_settings"] == {"node_threshold": 0.7, "edge_threshold": 0.9}
        influence = graph.influence()
        whole = {name: number for number, name in enumerate(node_ids(graph))}
        for name, node in zip(node_ids(each, LayerNumbers(graph)), data["nodes"], strict=True):
            value = influence[whole[name]]
            share = float(influence[influence >= value].sum() / influence.sum())
            if node["feature_type"] not in ("embedding", "logit"):
                share = min(share, 0.7)
            assert node["influence"] == pytest.approx(share), name


def test_a_graph_that_is_pruned_twice_is_drawn_as_a_whole(graph):
    for first, second in ((0.9, 0.6), (0.6, 0.9), (0.95, 0.9)):
        twice = graph.prune(first, 0.95).prune(second, 0.9)
        data = check_graph(viewer_graph(twice, "a"))
        assert second <= data["metadata"]["node_threshold"] <= max(first, second)
        assert data["metadata"]["pruning_settings"]["node_threshold"] == second
        # Still the influence in the whole graph.
        assert set(twice.cumulative_influence.tolist()) <= set(graph.prune(first, 0.95).cumulative_influence.tolist())


def test_a_graph_of_an_earlier_version(graph):
    """Its file lacks the influence before pruning."""
    pruned = dataclasses.replace(graph.prune(0.7, 0.9), cumulative_influence=None)
    for each in (pruned, pruned.prune(0.6)):
        data = check_graph(viewer_graph(each, "a"))
        assert data["metadata"]["node_threshold"] == 1.0 and len(drawn_by_the_client(data)) == each.num_nodes
        assert "within the pruned graph" in data["metadata"]["info"]["description"]
    assert "within" not in viewer_graph(graph, "a")["metadata"]["info"]["description"]


def test_combined_graphs_have_an_influence_of_their_own(graph):
    data = check_graph(viewer_graph(union([graph.prune(0.7), graph.prune(0.9)]), "a"))
    assert data["metadata"]["node_threshold"] == 1.0
    # Without positions the client still needs tokens to draw on.
    summed = viewer_graph(union([graph, graph], align="feature"), "a")
    assert len(summed["metadata"]["prompt_tokens"]) == 2 and len(drawn_by_the_client(summed)) == len(summed["nodes"])


def test_a_prompt_of_one_token():
    data = check_graph(viewer_graph(random_graph(tokens=[" gave"]), "a"))
    assert data["metadata"]["prompt_tokens"] == ["", " gave"] and {node["ctx_idx"] for node in data["nodes"]} == {1}


def test_the_address_of_hosted_features(graph, tmp_path):
    assert "feature_details" not in viewer_graph(graph, "a")["metadata"]
    metadata = viewer_graph(graph, "a", feature_base_url="https://example.org/my/features/")["metadata"]
    assert metadata["feature_details"] == {"feature_json_base_url": "https://example.org/my/features"}
    write_viewer_files(tmp_path, {"a": graph}, scan="gemma-2-2b", feature_base_url="https://example.org:8443/f")
    assert listed(tmp_path)["a"]["feature_details"] == {"feature_json_base_url": "https://example.org:8443/f"}
    assert listed(tmp_path)["a"]["scan"] == "gemma-2-2b"
    # Neuronpedia counts errors, and biases are none.
    nodes = json.loads((tmp_path / "a.json").read_text())["nodes"]
    assert sum(node["feature_type"] == "bias" for node in nodes) == int(graph.is_kind("bias").sum()) == 2


@pytest.mark.parametrize(
    "address",
    ["", "./features/x", "http://example.org/f", "https://", "https:///f", "https://u:p@example.org/f", "https://e.org/?a=1",
     "https://e.org/f#x", "https://e.org/a b", "https://e.org:port/f", "https://[e.org/f", "ftp://e.org", "https://e.org/<b>"],
)  # fmt: skip
def test_an_address_that_no_browser_can_read(graph, tmp_path, address):
    with pytest.raises(TranscoderError, match="is not the address of a folder"):
        write_viewer_files(tmp_path / "viewer", {"a": graph}, feature_base_url=address)
    assert not list(tmp_path.iterdir())


def test_labels_are_those_of_the_page(graph, tmp_path, browser):
    name = "layers.1.mlp.transcoder"
    features = {name: explained(graph, name, 3)}
    features[name][0].contexts.append(FeatureContext([" x", " beans"], [0.0, 2.0], 1, 1, 3))
    features[name][1].top_tokens += [(" more", 1.0), (" most", 0.9), (" never", 0.8)]
    features[name][2].contexts.clear()
    page = browser.new_page()
    page.goto(graph.to_html(tmp_path / "graph.html", features).as_uri())
    shown = page.evaluate("NODES.filter((node) => node.kind === 'feature').map((node) => node.about)")
    page.close()
    exported = [
        n for n in viewer_graph(graph, "a", features=features)["nodes"] if n["feature_type"].startswith("cross")
    ]
    assert any(label.startswith("“pea⏎k”, “beans” ") for label in shown)
    assert any(label.endswith("→ up, more, most") for label in shown)
    for label, node in zip(shown, exported, strict=True):
        # Rows of the client are empty without a label.
        assert node["clerp"] == label or (not label and re.fullmatch(r"L\d+ #\d+", node["clerp"]))


def test_cantor_numbers_are_unique():
    pairs = [(layer, feature) for layer in range(40) for feature in range(200)]
    assert len({cantor(*pair) for pair in pairs}) == len(pairs)


def test_a_feature_that_never_fired():
    content = feature_json(
        FeatureExplanation(3, 0.0, 0.0, 0.0, [], [], [], histogram=ActivationHistogram([], 0.0)), 9, "a"
    )
    check(content, "feature")
    # Zeros would be drawn as bars.
    assert content["histogram"] == content["quantile_values"] == []
    assert content["examples_quantiles"][0]["examples"] == []


def test_the_method_writes_a_file(graph, tmp_path):
    path = graph.to_viewer_json(tmp_path / "ioi.json", scan="gpt2-small")
    metadata = check_graph(json.loads(path.read_text()))["metadata"]
    assert (metadata["slug"], metadata["scan"]) == ("ioi", "gpt2-small")


@pytest.mark.parametrize("slug, scan", [("../up", None), ("", None), ("a b", None), ("a", "../x"), ("a", "./../x")])
def test_names_that_are_no_files(graph, tmp_path, slug, scan):
    with pytest.raises(TranscoderError, match="use letters"):
        write_viewer_files(tmp_path / "viewer", {slug: graph}, scan=scan)
    assert not list(tmp_path.iterdir())


def test_the_name_of_the_list_is_taken(graph, tmp_path):
    with pytest.raises(TranscoderError, match="another slug"):
        write_viewer_files(tmp_path / "viewer", {"Graph-Metadata": graph})
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
