"""`hf-transcoders push`, and the script that shows pushing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_transcoders import TranscoderModel, TranscoderSet
from hf_transcoders.cli import main

from .conftest import READER, assert_same_function, make_dictionary, make_set


ROOT = Path(__file__).parents[2]


def test_push_a_set_and_read_it_back(hub, tmp_path, capsys):
    transcoders = make_set(3, 5)
    transcoders.save_pretrained(tmp_path)
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"large")
    assert main(["push", str(tmp_path), "me/set", "--private", "--json", "--message", "From the line"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["commit"] == hub.repos["me/set"].refs["main"] and hub.repos["me/set"].private
    assert hub.log("me/set")[0] == "From the line"
    assert not any("checkpoint" in path for path in hub.files("me/set"))
    for name, loaded in TranscoderSet.from_pretrained("me/set").items():
        assert_same_function(transcoders[name], loaded)
    assert main(["info", "--transcoders", "me/set"]) == 0
    assert "layers.5.mlp.transcoder" in capsys.readouterr().out


def test_push_a_dictionary_as_it_lies_there(hub, tmp_path, capsys):
    model = make_dictionary()
    model.save_pretrained(tmp_path, max_shard_size=3000)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    arguments = ["push", str(tmp_path), "me/x", "--remote-code", "--branch", "next", "--subfolder", "l3"]
    assert main(arguments) == 0
    assert hub.url in capsys.readouterr().out
    files = hub.files("me/x", "next")
    assert "l3/model.safetensors.index.json" in files and "modeling_transcoder.py" in files
    assert files["l3/README.md"].decode().startswith("---\nlicense: mit\n---\nMine.\n")
    assert_same_function(model, TranscoderModel.from_pretrained("me/x", revision="next", subfolder="l3"))
    # The folder itself is as it was.
    assert not list(tmp_path.glob("*.py")) and "auto_map" not in (tmp_path / "config.json").read_text()
    assert main(["push", str(tmp_path), "me/x", "--create-pr"]) == 0
    assert capsys.readouterr().out.strip() == f"{hub.url}/me/x/discussions/1"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "me/x"], "There is no folder nowhere"),
        (["empty", "me/x"], "holds neither a dictionary"),
        (["whole", "me/x", "--token", "hf_wrong"], "does not accept the token"),
        (["whole", "me/x", "--token", READER], "may not write to me/x"),
        (["whole", "you/x"], "may not write to you/x"),
        (["whole", "me/x", "--create-pr"], "There is no repo me/x"),
        (["broken", "me/x"], "has no dictionary 'layers.3.mlp.transcoder'"),
    ],
)
def test_mistakes_are_one_sentence(hub, tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    make_dictionary().save_pretrained("whole")
    make_set(3, 5).save_pretrained("broken")
    Path("broken", "layers.3.mlp.transcoder", "config.json").unlink()
    assert main(["push", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-transcoders push: ") and sentence in error
    assert not hub.repos


def test_the_example_pushes_and_loads_back(tmp_path):
    """On a machine where no Hub answers, it says so and uses a local server."""
    make_set(3, 5).save_pretrained(tmp_path / "trained")
    script = ROOT / "examples" / "scripts" / "push_and_load.py"
    done = subprocess.run(
        [sys.executable, str(script), "--folder", str(tmp_path / "trained"), "--repo", "me/example"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "local server" in done.stdout and done.stdout.count("equal bit for bit") == 2
