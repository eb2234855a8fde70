"""The command line: what it prints, what it writes, how it fails."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from hf_transcoders import TranscoderModel, TranscoderSet
from hf_transcoders.cli import main
from hf_transcoders.cli.train import parse as parse_train
from tests.cli.setups import train_arguments


@pytest.fixture(scope="module")
def trained(workplace):
    output = workplace / "run"
    assert main(train_arguments(workplace, output, "--kind", "transcoder", "sae", "--disable_tqdm", "True")) == 0
    return output


def test_train_writes_a_set_that_loads_and_a_report(trained):
    loaded = TranscoderSet.from_pretrained(trained)
    assert list(loaded) == ["layers.1.mlp.transcoder", "layers.1.mlp.branch.sae"]
    summary = loaded["layers.1.mlp.transcoder"].config.training_summary
    assert summary["tokens"] == 640 and summary["dataset"] == "train.txt"
    report = json.loads((trained / "evaluation.json").read_text())
    assert report["dictionaries"]["layers.1.mlp.transcoder"]["metrics"]["l0"] == 4
    assert not list(trained.glob(".*"))


def test_train_a_single_dictionary_and_print_json(workplace, tmp_path, capsys):
    assert main(train_arguments(workplace, tmp_path, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dictionaries"]["layers.1.mlp.transcoder"]["metrics"]["fvu"] > 0
    assert report["cautions"]["steps"] == "layers.1.mlp.transcoder: trained for 20 steps only."
    assert report["cautions"]["tokens"].startswith("Measured on ")
    assert TranscoderModel.from_pretrained(tmp_path).config.k == 4


def test_train_on_a_stream(workplace, tmp_path):
    more = ("--streaming", "--eval_data", str(workplace / "test.txt"), "--disable_tqdm", "True")
    assert main(train_arguments(workplace, tmp_path, *more)) == 0
    summary = TranscoderModel.from_pretrained(tmp_path).config.training_summary
    assert summary["tokens"] == 640 and summary["dataset_rows"] is None


def test_train_resumes_to_the_same_weights(workplace, tmp_path, caplog):
    saving = ("--save_steps", "5", "--save_total_limit", "9", "--disable_tqdm", "True")
    assert main(train_arguments(workplace, tmp_path / "run", *saving)) == 0
    straight = TranscoderModel.from_pretrained(tmp_path / "run").state_dict()
    for checkpoint in ("checkpoint-15", "checkpoint-20"):
        shutil.rmtree(tmp_path / "run" / checkpoint)
    assert main(train_arguments(workplace, tmp_path / "run", *saving, "--resume")) == 0
    resumed = TranscoderModel.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    # A run that was killed before its first checkpoint: the same command line starts it, and says so.
    assert main(train_arguments(workplace, tmp_path / "early", *saving, "--resume")) == 0
    early = TranscoderModel.from_pretrained(tmp_path / "early").state_dict()
    assert all(torch.equal(straight[name], early[name]) for name in straight)
    assert f"There is no checkpoint in {tmp_path / 'early'} yet: the run starts from the beginning." in caplog.text


def test_evaluate(workplace, trained, capsys, tmp_path):
    command = [
        "evaluate", "--transcoders", str(trained), "--model", str(workplace / "model"), "--data", str(workplace / "test.txt"),
        "--sequence-length", "16", "--max-tokens", "150", "--loss-tokens", "100", "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    assert main([*command, "--json", "--output", str(tmp_path / "out")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert "held-out tokens only" in printed.pop("cautions")["tokens"]
    assert printed == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    metrics = printed["dictionaries"]["layers.1.mlp.transcoder"]["metrics"]
    assert metrics["l0"] == 4 and 0 <= metrics["top1_agreement"] <= 1
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "CE recovered (mean)" in table and re.search(r"test\.txt.*\n.*1[34]\d for fidelity", table)


def test_features(workplace, trained, capsys):
    command = [
        "features", "--transcoders", str(trained), "--model", str(workplace / "model"), "--data", str(workplace / "test.txt"),
        "--sequence-length", "16", "--max-tokens", "150", "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    assert main([*command, "--dictionary", "layers.1.mlp.transcoder", "--max-features", "3", "--json"]) == 0
    features = json.loads(capsys.readouterr().out)
    assert len(features) == 3
    assert all(context["activations"][context["peak"]] > 0 for f in features for context in f["contexts"])
    assert main(command) == 2
    assert "choose one with --dictionary" in capsys.readouterr().err


def test_info(trained, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr("hf_transcoders.models.saved_model.read_tensors", refuse)
    assert main(["info", "--transcoders", str(trained), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layers.1.mlp.transcoder"]["reads"] == "layers.1.mlp.in"
    assert facts["layers.1.mlp.branch.sae"]["kind"] == "sparse autoencoder"
    assert main(["info", "--transcoders", str(trained / "layers.1.mlp.transcoder")]) == 0
    assert "top 4 of each token" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert torch.__version__.split("+")[0] in capsys.readouterr().out


def test_yaml_numbers_and_override(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: some/model\nlearning_rate: 1e-3\nlayers: [3, 4]\nkind: sae\nnum-features: 128\nbf16: false\n"
        "l1_coefficient: 5e-4\nactivation: relu\nuse_cpu: true\n"
    )
    options = parse_train(["--config", str(config), "--num_features", "256", "--output_dir", str(tmp_path)], "t")
    assert options.training.learning_rate == 1e-3 and isinstance(options.training.learning_rate, float)
    assert options.options.l1_coefficient == 5e-4
    assert options.options.layers == [3, 4] and options.options.kind == ["sae"]
    assert options.options.num_features == 256  # The command line wins.
    assert options.options.model == "some/model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_such_option: 1\n", "'no_such_option' that does not exist"),
        ("learning_rate: fast\n", "'learning_rate' the value 'fast'"),
        ("activation: softmax\n", "choose from relu"),
        ("[1, 2]\n", "`name: value` lines"),
        ("a: [1\n", "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, capsys, text, message):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    assert main(["train", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--layers", "9"], r"layer"),
        (["--k", "65"], r"k is 65"),
        (["--model", "/no/such/model"], r"There is no folder /no/such/model: give by --model"),
        (["--data", "/no/such/file.txt"], r"no/such/file"),
        (["--resume", "runs/nowhere"], r"runs/nowhere is not a checkpoint"),
        (["--input_site", "layers.1.mlp.inn", "--layers"], r"mlp\.in"),
        (["--max_tokens", "10"], r"less than one step"),
        (["--sequence_length", "0"], r"sequence-length"),
        (["--activation", "relu"], r"`k` has no meaning"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing_behind(workplace, tmp_path, capsys, changes, message):
    output = tmp_path / "out"
    arguments = train_arguments(workplace, output, *changes)
    if "--input_site" in changes:
        at = arguments.index("--layers")
        del arguments[at : at + 2]
        arguments.remove("--layers")
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-transcoders train: ") and re.search(message, error)
    assert "Traceback" not in error
    assert not list(output.rglob("*.safetensors"))


def test_damaged_and_foreign_folders(workplace, trained, tmp_path, capsys):
    assert main(["info", "--transcoders", str(tmp_path)]) == 2
    assert "neither a dictionary" in capsys.readouterr().err
    assert main(["info", "--transcoders", str(tmp_path / "nothing")]) == 2
    assert "There is no folder" in capsys.readouterr().err
    broken = tmp_path / "broken"
    TranscoderModel.from_pretrained(trained, subfolder="layers.1.mlp.transcoder").save_pretrained(broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["info", "--transcoders", str(broken)]) == 2
    assert "damaged or cut short" in capsys.readouterr().err
    config = broken / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"format_version": 99}))
    assert main(["info", "--transcoders", str(broken)]) == 2
    assert "upgrade" in capsys.readouterr().err


def test_packaged_models_go_by_their_hub_names():
    from hf_transcoders.cli.common import base_model_of

    class Dictionaries:
        base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"

    assert base_model_of(Dictionaries(), None) == "smollm2-135m-instruct"
    assert base_model_of(Dictionaries(), "other/model") == "other/model"


def test_debug_shows_the_traceback(tmp_path):
    from hf_transcoders import TranscoderError

    with pytest.raises(TranscoderError):
        main(["info", "--transcoders", str(tmp_path / "nothing"), "--debug"])


def test_help_is_short_and_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("demo", "train", "evaluate", "features", "study", "info"))
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert (
        "--num-features" in shown
        and "--learning-rate" in shown
        and "--num_features" not in shown
        and "--help-all" in shown
    )
    assert "deepspeed" not in shown
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    assert "--deepspeed" in capsys.readouterr().out


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light():
    """Under a second beyond torch and transformers, and nothing that is not needed."""
    took, modules = run_python(
        "import time, sys, torch; from transformers import AutoConfig, AutoModel, PreTrainedModel;"
        "start = time.perf_counter(); import hf_transcoders; took = time.perf_counter() - start;"
        "print(took, [m for m in ('datasets', 'evaluate', 'trackio') if m in sys.modules])"
    ).split(" ", 1)
    assert float(took) < 1.0
    assert modules == "[]"


def test_training_and_loading_run_without_datasets_and_evaluate(tmp_path):
    run_python(
        f"""
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in ("datasets", "evaluate") else find_spec(name, *a)
sys.modules["datasets"] = sys.modules["evaluate"] = None  # Importing them raises ImportError.
from hf_transcoders import TranscoderConfig, TranscoderEvaluator, TranscoderModel, TranscoderTrainer
from hf_transcoders import TranscoderTrainingArguments
from tests.data.test_harvest import token_rows
from tests.tiny_models import tiny_model
base = tiny_model("llama")
model = TranscoderModel(TranscoderConfig.for_model(base, "layers.1.mlp.in", "layers.1.mlp.branch", num_features=64, k=4))
args = TranscoderTrainingArguments({str(tmp_path)!r}, max_steps=3, per_device_train_batch_size=32, use_cpu=True,
                                   save_strategy="no", report_to="none", disable_tqdm=True)
trainer = TranscoderTrainer(model, base, args, token_rows(32))
trainer.train()
trainer.save_model()
loaded = TranscoderModel.from_pretrained({str(tmp_path)!r})
TranscoderEvaluator(base, token_rows(8), progress=False).evaluate(loaded)
"""
    )
