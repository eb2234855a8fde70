"""The page of an attribution graph as text: it is complete and safe, and refuses graphs that are too large."""

import base64
import hashlib
import json
import re

import pytest

from hf_transcoders.circuits.graphs.page_data import page_data
from hf_transcoders.errors import TranscoderError
from hf_transcoders.reports.graph import render_graph

from .random_graph import random_graph


def data_of(html, name="graph-0"):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', html, re.S).group(1))


def test_the_page_holds_the_graph(tmp_path):
    graph = random_graph(difference=True).prune(0.95, 0.99)
    html = graph.to_html(tmp_path / "graph.html").read_text()
    data = data_of(html)
    assert data["edges"]["source"] == graph.source.tolist() and data["edges"]["target"] == graph.target.tolist()
    assert data["edges"]["weight"] == pytest.approx(graph.weight.tolist(), rel=1e-5)
    assert [node["label"] for node in data["nodes"]] == [graph.label(i) for i in range(graph.num_nodes)]
    assert [node["influence"] for node in data["nodes"]] == pytest.approx(graph.influence().tolist(), rel=1e-5)
    assert f"{graph.metadata['pruning']['dropped_error_nodes']} errors" in data["left_out"]
    # The influence of the edges into the targets is at most the weight of the targets.
    flow = sum(
        f
        for f, t in zip(data["edges"]["flow"], data["edges"]["target"], strict=True)
        if data["nodes"][t]["kind"] == "target"
    )
    assert 0 < flow <= 1 + 1e-6


def test_it_asks_for_nothing_and_runs_only_its_own_script(tmp_path):
    evil = "</script><script>alert(1)</script><!-- <style>"
    graph = random_graph(tokens=("<s>", evil, " b"), metadata={"model": evil, "nan": float("nan")})
    html = graph.to_html(tmp_path / "graph.html").read_text()
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and f"script-src 'sha256-{digest}'" in html and "default-src 'none'" in html
    assert "alert(1)</script>" not in html and data_of(html)["tokens"][1] == evil
    assert data_of(html)["facts"]["nan"] is None
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#|data:,)", html) and "innerHTML" not in html


def test_mistakes_are_one_sentence(tmp_path, monkeypatch):
    graph = random_graph()
    with pytest.raises(TranscoderError, match="has no dictionary 'nope'"):
        graph.to_html(tmp_path / "graph.html", {"nope": []})
    monkeypatch.setattr("hf_transcoders.circuits.graphs.page_data.MAX_EDGES", graph.num_edges - 1)
    with pytest.raises(TranscoderError, match="prune"):
        graph.to_html(tmp_path / "graph.html")
    assert not list(tmp_path.iterdir())


def test_a_graph_of_targets_alone():
    graph = random_graph(density=0.0)
    html = render_graph(page_data(graph.select(graph.is_kind("target", "token"))))
    assert len(data_of(html)["nodes"]) == 9
