"""`hf-transcoders train --kind cross-layer`: what it trains, what `plan` tells about it, and what it refuses."""

import json

import pytest

from hf_transcoders import CrossLayerTranscoder
from hf_transcoders.cli import main
from tests.cli.setups import train_arguments
from tests.tiny_models import NUM_LAYERS


def test_train(workplace, tmp_path, capsys):
    # The last --layers counts.
    arguments = train_arguments(workplace, tmp_path / "run", "--kind", "cross-layer", "--layers", "2", "1", "--json")
    assert main(arguments) == 0
    trained = CrossLayerTranscoder.from_pretrained(tmp_path / "run")
    assert list(trained) == [f"layers.{layer}.mlp.cross_layer_transcoder" for layer in (1, 2)]
    assert trained.config.k == 4 and trained.config.training_summary["tokens"] == 640
    report = json.loads(capsys.readouterr().out)
    assert report["dictionaries"].keys() == set(trained)
    assert (
        main(["evaluate", "--transcoders", str(tmp_path / "run"), "--data", str(workplace / "test.txt"), "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["dictionaries"].keys() == set(trained)


def test_options_reach_the_configuration(workplace, tmp_path):
    arguments = train_arguments(
        workplace, tmp_path / "run", "--kind", "cross-layer", "--layers", *map(str, range(NUM_LAYERS)),
        "--cross-layer-window", "1", "--activation", "batchtopk", "--batchtopk-scope", "all",
    )  # fmt: skip
    assert main(arguments) == 0
    config = CrossLayerTranscoder.from_pretrained(tmp_path / "run").config
    assert (config.window, config.batchtopk_scope, config.num_sources) == (1, "all", NUM_LAYERS)


@pytest.mark.parametrize("more", [[], ["--measure"]])
def test_plan(workplace, tmp_path, capsys, more):
    _, *arguments = train_arguments(workplace, tmp_path / "run", "--kind", "cross-layer", "--json")
    place = arguments.index("--layers")
    del arguments[place : place + 2]
    assert main(["plan", *arguments, "--processes", "2", *more]) == 0
    plan = json.loads(capsys.readouterr().out)
    width, features = 32, 64
    decoders = NUM_LAYERS * (NUM_LAYERS + 1) // 2
    expected = features * width * (NUM_LAYERS + decoders) + NUM_LAYERS * (features + width)
    assert plan["parameters"] == expected and plan["held"].keys() == {"ddp"}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kind", "cross-layer", "sae"], "without other kinds"),
        (["--kind", "cross-layer", "--input-site", "layers.1.mlp.in"], "without --input-site and --output-site"),
        (["--cross-layer-window", "2"], "--cross-layer-window has a meaning for cross-layer transcoders alone"),
        (["--tanh-coefficient", "1e-3"], "--tanh-coefficient has a meaning"),
        (["--batchtopk-scope", "all"], "--batchtopk-scope has a meaning"),
        (["--kind", "cross-layer", "--cross-layer-window", "-2"], "`window` is -2"),
        (["--kind", "cross-layer", "--activation", "gated"], "not supported in a cross-layer transcoder"),
        (["--kind", "cross-layer", "--layers", "99"], "There is no layer 99"),
    ],
)
def test_refusals(workplace, tmp_path, capsys, more, message):
    assert main(train_arguments(workplace, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_sweep_takes_no_cross_layer_transcoder(capsys):
    assert main(["sweep", "--kind", "cross-layer"]) == 2
    assert "--kind is 'cross-layer', but must be one of transcoder, sae" in capsys.readouterr().err
