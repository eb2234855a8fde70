"""`hf-transcoders graph`: what it writes, prints and refuses."""

import json

import pytest

from hf_transcoders import TranscoderConfig, TranscoderModel, TranscoderSet
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
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert len(data["nodes"]) == pruned.num_nodes and data["scores"] == pytest.approx(printed["scores"])
    # The validation of direct effects is exact, and every feature on the page is explained.
    assert printed["validation"]["direct"]["relative_error"] < 1e-3 and len(data["validation"]["edges"]) == 8
    shown = {f"{n['dictionary']}/{n['index']}" for n in data["nodes"] if n["kind"] == "feature"}
    assert shown == data["features"].keys() and any(f["contexts"] for f in data["features"].values())
    assert printed["strongest"][0]["label"] in [node["label"] for node in data["nodes"]]
    viewer = tmp_path / "out" / "viewer"
    (metadata,) = json.loads((viewer / "graph-metadata.json").read_text())["graphs"]
    assert metadata["slug"] == "when-mary-and-john-went-to-the-store-john-gave-a-drink-to"
    assert (metadata["node_threshold"], metadata["pruning_settings"]["edge_threshold"]) == (0.8, 0.98)
    assert metadata["scan"].startswith("./data/features/") and "feature_details" not in metadata
    assert len(json.loads((viewer / f"{metadata['slug']}.json").read_text())["nodes"]) == pruned.num_nodes
    files = list((viewer / metadata["scan"].removeprefix("./data/")).iterdir())
    assert len(files) == len(shown)
    contents = [json.loads(path.read_text()) for path in files]
    counts = [(sum(content["histogram"]), content["activation_frequency"]) for content in contents]
    # Counted over all of the text, unlike the contexts.
    (tokens,) = {round(fired / frequency) for fired, frequency in counts if fired}
    assert 512 <= tokens < 1024 and all(frequency == pytest.approx(fired / tokens) for fired, frequency in counts)


def test_files_for_neuronpedia(folder, tmp_path, capsys):
    more = [
        "--viewer",
        "--feature-base-url",
        "https://example.org/f/",
        "--scan",
        "gemma-2-2b",
        "--validate",
        "0",
        "--json",
    ]
    assert graph(folder, tmp_path / "out", *more) == 0
    (metadata,) = json.loads((tmp_path / "out" / "viewer" / "graph-metadata.json").read_text())["graphs"]
    assert metadata["feature_details"] == {"feature_json_base_url": "https://example.org/f"}
    assert metadata["scan"] == "gemma-2-2b"


def test_chosen_targets_and_plain_text(folder, tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    more = ["--targets", " Mary", "--target-difference", " Mary", " John", "--validate", "4", "--open"]
    assert graph(folder, tmp_path / "out", *more) == 0
    out = capsys.readouterr().out
    assert "' Mary'" in out and "' Mary - John'" in out and "completeness" in out and "strongest features" in out
    assert "all but the direct effect" in out and str(tmp_path / "out" / "graph.html") in out
    assert opened == [(tmp_path / "out" / "graph.html").as_uri()]
    labels = [target.label for target in AttributionGraph.from_pretrained(tmp_path / "out").targets]
    assert labels == [" Mary", " Mary - John"]


def test_a_set_with_two_kinds_at_one_place_needs_a_kind(folder, tmp_path, capsys):
    dictionaries = dict(TranscoderSet.from_pretrained(folder / "set").items())
    config = TranscoderConfig(
        d_in=(one := next(iter(dictionaries.values())).config).d_out,
        num_features=24,
        activation="relu",
        input_site=one.output_site,
        output_site=one.output_site,
    )
    TranscoderSet({**dictionaries, "sae": TranscoderModel(config)}).save_pretrained(tmp_path / "set")
    command = ["--transcoders", str(tmp_path / "set"), "--max-features", "10", "--validate", "0"]
    assert graph(folder, tmp_path / "out", *command) == 2
    assert "write to one place: keep one of them (on the command line, --kind transcoder" in capsys.readouterr().err
    for kind, count in (("transcoder", 3), ("sae", 1)):
        assert graph(folder, tmp_path / "out", *command, "--kind", kind) == 0
        assert len(AttributionGraph.from_pretrained(tmp_path / "out").dictionaries) == count
    capsys.readouterr()
    assert graph(folder, tmp_path / "out", "--kind", "sae") == 2
    assert "has no dictionary of --kind sae: it has layers.0.mlp.transcoder, " in capsys.readouterr().err


def test_a_page_without_features_says_why(folder, tmp_path, capsys):
    """With so little influence kept, only targets and tokens stay."""
    assert graph(folder, tmp_path / "out", "--nodes", "0.001", "--features-from", str(folder / "text.txt")) == 0
    assert "No feature is on the page" in (out := capsys.readouterr().out) and "write at 3 of 3 layers" in out


def test_a_page_shows_no_more_edges_than_a_browser_draws(folder, tmp_path, capsys, monkeypatch):
    from hf_transcoders.circuits.graphs import page_data

    monkeypatch.setattr(page_data, "MAX_EDGES", 30)
    assert graph(folder, tmp_path / "out", "--validate", "0", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert 0 < printed["pruned"]["num_edges"] <= 30 < printed["edges"] and printed["pruned"]["edges"] < 0.98


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--targets", "no such token"], "is not one token"),
        (["--nodes", "80"], "between 0 and 1"),
        (["--max-features", "0"], "give at least 1"),
        (["--features-from", "nowhere.txt"], "nowhere.txt"),
        (["--feature-base-url", "https://example.org/f"], "give --viewer too"),
        (["--viewer", "--feature-base-url", "http://example.org/f"], "https://example.org/features"),
        (["--viewer", "--scan", "a b"], "cannot be a scan"),
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
