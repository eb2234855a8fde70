"""Verdicts on scores and validations, what pruning left out, and why a page has no features."""

import dataclasses

import pytest

from hf_transcoders.circuits.graphs import AttributionGraph, graph_verdicts
from hf_transcoders.circuits.graphs.verdicts import left_out, missing_features

from .random_graph import random_graph


def verdicts(replacement=0.5, completeness=0.8, certificate=None):
    scores = {"replacement": replacement, "completeness": completeness, "rest": 0.0}
    graph = random_graph(metadata={"scores": scores, "certificate": certificate})
    return {verdict.about: (verdict.level, verdict.text) for verdict in graph_verdicts(graph)}


@pytest.mark.parametrize(
    "completeness, level, text",
    [
        (0.8, "good", "Features and tokens carry most of this prompt: 20% of"),
        (0.79, "fair", "Errors carry a large part of this prompt: 21% of"),
        (0.5, "fair", "Errors carry a large part of this prompt: 50% of"),
        (0.04, "poor", "Errors carry most of this prompt: 96% of"),
        (0.0, "poor", "Errors carry most of this prompt: 100% of"),
        (0.9996, "good", "Features and tokens carry most of this prompt: 0.04% of"),
    ],
)
def test_completeness(completeness, level, text):
    found = verdicts(completeness=completeness)["completeness"]
    assert found[0] == level and found[1].startswith(text)


@pytest.mark.parametrize(
    "replacement, level", [(0.5, "good"), (0.49, "fair"), (0.2, "fair"), (0.19, "poor"), (0, "poor")]
)
def test_replacement(replacement, level):
    assert verdicts(replacement=replacement)["replacement"][0] == level


def summary(pearson=0.9, sign=0.9, error=0.3, edges=64, direct=1e-6):
    found = {"edges": edges, "pearson": pearson, "sign_agreement": sign, "relative_error": error}
    return {"direct": {**found, "relative_error": direct}, "free": found}


@pytest.mark.parametrize(
    "certificate, level, text",
    [
        (summary(), "good", "Edges predict what ablations do in the model: correlation 0.90, same sign in 90% of 64 edges, error 30%"),
        (summary(error=0.6), "fair", "Edges predict the direction but not the size"),
        (summary(pearson=0.6), "fair", "Edges predict the direction but not the size"),
        (summary(sign=0.6), "poor", "Edges do not predict"),
        (summary(pearson=0.2), "poor", "Edges do not predict"),
        (summary(direct=0.2), "poor", "Edges are not even the direct effects that they should be (error 20%)"),
        (summary(edges=5), "poor", "Too few edges were validated for a verdict: 5 edges"),
        (summary(pearson=float("nan")), "poor", "Too few edges were validated"),
        ({"frozen": summary()["free"]}, "good", "Edges predict what ablations do"),
    ],
)  # fmt: skip
def test_validation(certificate, level, text):
    found = verdicts(certificate=certificate)["validation"]
    assert found[0] == level and found[1].startswith(text)


def test_without_a_validation_there_is_no_verdict_on_it():
    assert verdicts().keys() == verdicts(certificate={"other mode": {}}).keys() == {"completeness", "replacement"}


def test_what_pruning_left_out_adds_up():
    graph = random_graph(features=5, density=0.5)
    pruned = graph.prune(0.6, 0.8)
    report = pruned.metadata["pruning"]
    assert report["dropped_nodes"] == graph.num_nodes - pruned.num_nodes
    assert report["dropped_edges"] == graph.num_edges - pruned.num_edges > 0
    assert report["dropped_features"] == int(graph.is_kind("feature").sum() - pruned.is_kind("feature").sum()) > 0
    influence, carried = graph.influence(), graph.edge_influence()
    kept = {(graph.label(a), graph.label(b)) for a, b in zip(graph.source.tolist(), graph.target.tolist(), strict=True)} & {
        (pruned.label(a), pruned.label(b)) for a, b in zip(pruned.source.tolist(), pruned.target.tolist(), strict=True)
    }  # fmt: skip
    ends = zip(graph.source.tolist(), graph.target.tolist(), strict=True)
    share = sum(
        w for (a, b), w in zip(ends, carried.tolist(), strict=True) if (graph.label(a), graph.label(b)) in kept
    )
    assert 1 - report["dropped_edge_influence"] == pytest.approx(share / float(carried.sum()), abs=0.05)
    text = left_out(pruned)
    assert (
        f"{pruned.num_nodes} of {graph.num_nodes} nodes" in text
        and f"{report['dropped_features']} features with" in text
    )
    assert 0 < report["dropped_feature_influence"] < report["dropped_influence"] < 1
    assert float(influence.sum()) > 0 and left_out(graph) is None


def test_the_advice_for_a_page_without_features_works():
    graph = random_graph(features=5, density=0.5)
    bare = graph.prune(0.01)
    assert not bare.is_kind("feature").any() and missing_features(graph) is None
    report = bare.metadata["pruning"]
    shown = int(graph.prune(report["features_from"]).is_kind("feature").sum())
    assert report["features_then"] == shown > 0
    text = missing_features(bare)
    assert f"Try --nodes {report['features_from']:g} (`prune(nodes={report['features_from']:g})` in Python)" in text
    assert f"shows {shown} feature" in text and "covers 3 of 4 layers" in text
    assert missing_features(graph.prune(report["features_from"])) is None


def test_the_advice_names_the_share_of_edges_where_it_matters():
    graph = random_graph(features=5, density=0.5)
    bare = graph.prune(0.8, 0.0)
    assert not bare.is_kind("feature").any()
    shown = int(graph.prune(1.0, 1.0).is_kind("feature").sum())
    assert (
        f"Try --nodes 1 --edges 1 (`prune(nodes=1, edges=1)` in Python), which shows {shown} features"
        in missing_features(bare)
    )


def test_graphs_whose_dictionaries_are_not_active():
    graph = random_graph()
    none = graph.select(~graph.is_kind("feature"))
    assert missing_features(none).startswith("No feature is active on this prompt: the set covers 3 of 4 layers.")
    some = dataclasses.replace(none, metadata={**none.metadata, "active_features": 12})
    assert missing_features(some).startswith("None of the 12 active features became a node")


def test_graphs_that_earlier_versions_pruned(tmp_path):
    pruned = random_graph(features=5, density=0.5).prune(0.01)
    old = ("nodes", "edges", "dropped_nodes", "dropped_influence", "dropped_error_nodes", "dropped_error_influence")
    report = {name: pruned.metadata["pruning"][name] for name in old}
    dataclasses.replace(pruned, metadata={**pruned.metadata, "pruning": report}).save_pretrained(tmp_path)
    loaded = AttributionGraph.from_pretrained(tmp_path)
    assert f"{loaded.num_nodes} of" in left_out(loaded) and "features with" not in left_out(loaded)
    assert missing_features(loaded).startswith("No feature is active")
    assert "owned" not in loaded.to_html(tmp_path / "old.html").read_text()
