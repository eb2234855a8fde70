"""`hf-transcoders explain`: what it writes, prints and refuses."""

import json

import pytest

from hf_transcoders import TranscoderConfig, TranscoderModel
from hf_transcoders.cli import main
from hf_transcoders.features import load_examples
from hf_transcoders.features.explain import load_explanations
from tests.tiny_models import tiny_model

from .setups import fill_workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = fill_workplace(tmp_path_factory.mktemp("explain"))
    config = TranscoderConfig.for_model(
        tiny_model("llama"), "layers.1.mlp.in", "layers.1.mlp.branch", num_features=24, k=3, decoder_init="random"
    )
    config.base_model_name_or_path = str(place / "model")
    TranscoderModel(config).save_pretrained(place / "one")
    return place


def explain(place, output, *more, data="train.txt"):
    return main(
        ["explain", str(place / "one"), "--data", str(place / data), "--sequence-length", "16", "--example-tokens", "8", "--device",
         "cpu", "--output", str(output), *more]
    )  # fmt: skip


def test_it_writes_scores_and_explanations(place, tmp_path, capsys):
    assert explain(place, tmp_path / "out", "--max-features", "6", "--surprisal", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    means = {(mean["explainer"], mean["score"]): mean for mean in printed["means"]}
    floor = means["token-table floor", "simulation.top_and_random"]
    assert -1 <= floor["low"] <= floor["mean"] <= floor["high"] <= 1 and floor["above_floor"] is None
    combined = means["combination", "simulation.top_and_random"]
    assert combined["above_low"] <= combined["above_floor"] <= combined["above_high"]
    assert ("combination", "surprisal.auroc") in means and printed["control"]
    assert printed == {**json.loads((tmp_path / "out" / "results.json").read_text()), "page": printed["page"],
                       "saved": printed["saved"]}  # fmt: skip
    scored = [each["feature"] for each in printed["features"] if not each["skipped"]]
    saved = load_explanations(place / "one", TranscoderModel.from_pretrained(place / "one"))
    assert list(saved) == scored and all(each.explainer == "combination" for each in saved.values())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Random weights" in page or "random weights" in page
    assert len(load_examples(tmp_path / "out" / "examples")) == 1
    # Repeated, it reads what is there; the text is the same as without --json.
    before = (tmp_path / "out" / "scored.jsonl").read_bytes()
    assert explain(place, tmp_path / "out", "--max-features", "6", "--surprisal") == 0
    assert (tmp_path / "out" / "scored.jsonl").read_bytes() == before
    text = capsys.readouterr().out
    assert "token-table floor" in text and "random weights" in text and "feature_explanations.json" in text
    assert explain(place, tmp_path / "out", "--features", "1") == 2
    assert "is of a run with" in capsys.readouterr().err


def test_features_by_number_without_control(place, tmp_path, capsys):
    assert explain(place, tmp_path / "out", "--features", "3", "5", "--no-control", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [each["feature"] for each in printed["features"]] == [3, 5] and printed["control"] == []
    assert not (tmp_path / "out" / "control").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--max-features", "0"], "0 is out of range"),
        (["--max-features", "3", "--features", "4"], "not allowed with argument"),
        (["--features", "24"], "Feature 24 does not exist"),
        (["--chat-url", "http://localhost:1/v1"], "give the name of its model by --chat-model"),
        (["--chat-url", "localhost", "--chat-model", "m", "--features", "1"], "is not the address of a service"),
        (
            ["--max-tokens", "100", "--max-features", "4", "--no-control"],
            "None of the 4 features could be explained",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(place, tmp_path, capsys, more, message):
    assert explain(place, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err


def test_a_service_that_is_down(place, tmp_path, capsys):
    more = ["--features", "1", "2", "--chat-url", "http://127.0.0.1:9/v1", "--chat-model", "m", "--no-control"]
    assert explain(place, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert "did not answer" in error and "are kept in" in error
