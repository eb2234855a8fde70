"""`hf-transcoders graph`: what it writes, prints and refuses."""

import json

import pytest

from hf_transcoders import TranscoderConfig, TranscoderModel, TranscoderSet
from hf_transcoders.circuits.graphs import AttributionGraph
from hf_transcoders.cli import main
from hf_transcoders.features.explain import SavedExplanation, save_explanations
from hf_transcoders.models.transcoder_set import set_folders


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
    more = ["--target", " Mary", "--target-difference", " Mary", " John", "--validate", "4", "--open"]
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
        (["--feature-base-url", "https://example.org/f"], "give --viewer too"),
        (["--viewer", "--feature-base-url", "http://example.org/f"], "https://example.org/features"),
        (["--viewer", "--scan", "a b"], "cannot be a scan"),
        (["--prompts-from", "nowhere.txt"], "nowhere.txt could not be read"),
        (["--labels", "nowhere.json"], "nowhere.json"),
        (["--target-difference", " Mary", " Mary"], "is always 0: give two different tokens"),
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


def test_several_prompts_share_a_page(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("When Mary and John went\n\nJohn gave a drink to\n")
    more = ["--prompts-from", str(tmp_path / "prompts.txt"), "--validate", "0", "--viewer"]
    assert graph(folder, tmp_path / "out", *more, "John gave a drink to", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [each["prompt"].replace(" ", "") for each in printed["graphs"]] == [
        text.replace(" ", "")
        for text in (PROMPT, "John gave a drink to", "When Mary and John went", "John gave a drink to")
    ]
    html = (tmp_path / "out" / "graph.html").read_text()
    assert html.count('type="application/json"') == 5 and printed["page"] == str(tmp_path / "out" / "graph.html")
    names = ["when-mary-and-john-went", "john-gave-a-drink-to", "john-gave-a-drink-to-4"]
    for name in names:
        saved = AttributionGraph.from_pretrained(tmp_path / "out" / name)
        assert saved.num_nodes in [each["nodes"] for each in printed["graphs"]]
    alone = AttributionGraph.from_pretrained(tmp_path / "out" / names[0])
    assert graph(folder, tmp_path / "one", "--validate", "0", "--json", prompt="When Mary and John went") == 0
    assert json.loads(capsys.readouterr().out)["scores"] == pytest.approx(alone.scores())


def test_a_page_without_features_says_so_and_what_was_not_done(folder, tmp_path, capsys):
    more = ["--features-from", str(folder / "text.txt"), "--nodes", "0.01"]
    assert graph(folder, tmp_path / "out", *more) == 0
    out = capsys.readouterr().out
    html = (tmp_path / "out" / "graph.html").read_text()
    for sentence in (
        "No feature is strong enough for the page: the set covers 3 of 3 layers",
        "The graph was not validated: no feature on the page has an edge that could be.",
        f"--features-from {folder / 'text.txt'} was not searched",
    ):
        assert sentence in out and sentence in html
    assert "Try --nodes 0." in out
    share = out.split("Try --nodes ")[1].split()[0]
    assert graph(folder, tmp_path / "again", "--nodes", share, "--json", "--validate", "4") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["strongest"] and printed["notes"] == [] and printed["validation"]
    shows = int(out.split("which shows ")[1].split()[0])
    html = (tmp_path / "again" / "graph.html").read_text()
    nodes = json.loads(html.split('id="graph-0">')[1].split("</script>")[0])["nodes"]
    assert sum(node["kind"] == "feature" for node in nodes) == shows


def test_verdicts_and_what_was_left_out_are_printed(folder, tmp_path, capsys):
    assert graph(folder, tmp_path / "out", "--validate", "16") == 0
    out = capsys.readouterr().out
    assert graph(folder, tmp_path / "out", "--validate", "16", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [verdict["about"] for verdict in printed["verdicts"]] == ["completeness", "replacement", "validation"]
    assert all(f"  {verdict['level']}  {verdict['text']}" in out for verdict in printed["verdicts"])
    assert printed["left_out"] in out and f"{printed['pruned']['num_edges']:,} of {printed['edges']:,} edges" in out


def test_labels_from_a_file(folder, tmp_path, capsys):
    name = "layers.1.mlp.transcoder"
    content = {
        "format": "hf_transcoders graph labels",
        "version": 1,
        "labels": {name: {"3": "<i>three"}},
        "graphs": [],
    }
    (tmp_path / "labels.json").write_text(json.dumps(content))
    assert graph(folder, tmp_path / "out", "--validate", "0", "--labels", str(tmp_path / "labels.json")) == 0
    html = (tmp_path / "out" / "graph.html").read_text()
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert data["saved"]["labels"] == {name: {"3": "<i>three"}} and "<i>three" not in html
    capsys.readouterr()
    content["labels"] = {"layers.9.mlp.transcoder": {"3": "three"}}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    assert graph(folder, tmp_path / "no", "--labels", str(tmp_path / "labels.json")) == 2
    assert "has labels for layers.9.mlp.transcoder" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_explanations_that_were_saved_label_the_features(folder, tmp_path, capsys):
    loaded = TranscoderSet.from_pretrained(folder / "set")
    name, dictionary = next(iter(loaded.items()))
    explanations = {
        i: SavedExplanation("planted <b>label</b>", "combination") for i in range(dictionary.config.num_features)
    }
    path = save_explanations(explanations, dictionary, set_folders(folder / "set")[name])
    try:
        assert graph(folder, tmp_path / "out", "--max-features", "60") == 0
        html = (tmp_path / "out" / "graph.html").read_text()
        shown = json.loads(html.split('id="data">')[1].split("</script>")[0])["saved"]["labels"][name]
        assert shown["0"] == "planted <b>label</b>" and "<b>label" not in html
        # Explanations of other weights are not shown.
        path.write_text(path.read_text().replace("xxh3:", "xxh3:0"))
        assert graph(folder, tmp_path / "other") == 2
        assert "explains the features of other weights" in capsys.readouterr().err
    finally:
        path.unlink()
