"""`hf-transcoders baselines`: what it writes, prints and refuses."""

import json

from hf_transcoders import TranscoderSet
from hf_transcoders.cli import main
from tests.tiny_models import HIDDEN_SIZE


def test_a_set_for_each_kind(workplace, tmp_path, capsys):
    argv = [
        "baselines", "--model", str(workplace / "model"), "--data", str(workplace / "train.txt"), "--sites",
        "layers.1.resid_post", "--kinds", "pca", "random", "--num-features", "40", "--sequence-length", "16", "--device", "cpu",
        "--dtype", "float32", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["dictionaries"]
    assert [(row["kind"], row["num_features"]) for row in printed] == [("pca", 2 * HIDDEN_SIZE), ("random", 40)]
    for row in printed:
        (dictionary,) = TranscoderSet.from_pretrained(row["folder"]).values()
        assert dictionary.config.num_features == row["num_features"]
    assert main([*argv, "--max-tokens", "20"]) == 2
    assert "20 tokens do not determine the components" in capsys.readouterr().err
    assert main([*argv, "--kinds", "lda"]) == 2
    assert "lda" in capsys.readouterr().err
