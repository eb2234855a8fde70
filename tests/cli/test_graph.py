"""`hf-transcoders graph`: what it writes, prints and refuses."""

import json

import pytest

from hf_transcoders.circuits.graphs import AttributionGraph
from hf_transcoders.cli import main


PROMPT = "When Mary and John went to the store, John gave a drink to"


def graph(folder, output, *more, prompt=PROMPT):
    return main(
        ["graph", prompt, "--model", str(folder / "model"), "--transcoders", str(folder / "set"), "--device", "cpu",
         "--output", str(output), *more]
    )  # fmt: skip


def test_it_writes_the_graph_and_its_page(folder, tmp_path, capsys):
    more = ["--features-from", str(folder / "text.txt"), "--max-tokens", "512", "--validate", "8", "--viewer"]
    assert graph(folder, tmp_path / "out", *more, "--json", "--max-features", "60") == 0
    printed = json.loads(capsys.readouterr().out)
    saved = AttributionGraph.from_pretrained(tmp_path / "out")
    assert printed["nodes"] == saved.num_nodes and printed["scores"] == saved.scores()
    assert printed["largest_row_error"] < 1e-4
    pruned = saved.prune(0.8, 0.98)
    assert printed["pruned"]["num_nodes"] == pruned.num_nodes < saved.num_nodes
    html = (tmp_path / "out" / "graph.html").read_text()
    data = json.loads(html.split('id="graph-0">')[1].split("</script>")[0])
    assert len(data["nodes"]) == pruned.num_nodes and data["scores"] == pytest.approx(printed["scores"])
    # The validation of direct effects is exact, and every feature on the page is explained.
    assert printed["validation"]["direct"]["relative_error"] < 1e-3 and len(data["validation"]["edges"]) == 8
    shown = {
        f"{data['dictionaries'][n['dictionary']]['name']}/{n['index']}"
        for n in data["nodes"]
        if n["kind"] == "feature"
    }
    explained = json.loads(html.split('id="data">')[1].split("</script>")[0])["features"]
    assert shown == explained.keys() and any(f["contexts"] for f in explained.values())
    assert printed["strongest"][0]["label"] in [node["label"] for node in data["nodes"]]
    viewer = tmp_path / "out" / "viewer"
    (slug,) = [entry["slug"] for entry in json.loads((viewer / "data/graph-metadata.json").read_text())["graphs"]]
    assert slug == "when-mary-and-john-went-to-the-store-john-gave-a-drink-to"
    assert len(json.loads((viewer / f"graph_data/{slug}.json").read_text())["nodes"]) == pruned.num_nodes
    assert len(list((viewer / "features").rglob("*.json"))) == len(shown)


def test_chosen_targets_and_plain_text(folder, tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    more = ["--target", " Mary", "--target-difference", " Mary", " John", "--validate", "4", "--open"]
    assert graph(folder, tmp_path / "out", *more) == 0
    out = capsys.readouterr().out
    assert "' Mary'" in out and "' Mary - John'" in out and "completeness" in out and "strongest features" in out
    assert "all but the direct effect" in out and str(tmp_path / "out" / "graph.html") in out
    assert opened == [(tmp_path / "out" / "graph.html").as_uri()]
    labels = [target.label for target in AttributionGraph.from_pretrained(tmp_path / "out").targets]
    assert labels == [" Mary", " Mary - John"]


def test_a_page_shows_no_more_edges_than_a_browser_draws(folder, tmp_path, capsys, monkeypatch):
    from hf_transcoders.circuits.graphs import page_data

    monkeypatch.setattr(page_data, "MAX_EDGES", 30)
    assert graph(folder, tmp_path / "out", "--validate", "0", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert 0 < printed["pruned"]["num_edges"] <= 30 < printed["edges"] and printed["pruned"]["edges"] < 0.98


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--target", "no such token"], "is not one token"),
        (["--nodes", "80"], "between 0 and 1"),
        (["--max-features", "0"], "give at least 1"),
        (["--features-from", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(folder, tmp_path, capsys, more, sentence):
    assert graph(folder, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in error and error.startswith("hf-transcoders graph:")
    assert not list(tmp_path.iterdir())


def test_a_file_as_output(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert graph(folder, tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err
