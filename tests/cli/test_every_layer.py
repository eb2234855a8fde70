"""The recipe for every layer of a model: its config trains as it stands, its script ends in the whole-model table."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from hf_transcoders import EvaluationReport, TranscoderSet
from hf_transcoders.cli import main
from hf_transcoders.evaluation.evaluation_report import METRICS, REPLACEMENT_METRICS, TOGETHER, format_number
from tests.cli.setups import fill_workplace
from tests.tiny_models import TINY_CONFIGS


EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = EXAMPLES / "cli_configs" / "smollm2_all_layers.yaml"
SCRIPT = EXAMPLES / "scripts" / "train_every_layer.py"
SITES = [(f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch") for layer in range(30)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A text, and a tiny language model with as many layers as the one of the recipe."""
    folder = fill_workplace(tmp_path_factory.mktemp("every_layer"))
    config = TINY_CONFIGS["llama"]()
    config.num_hidden_layers = 30
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


def sites_of(dictionaries):
    return [(d.config.input_site, d.config.output_site) for d in dictionaries.values()]


def test_the_config_trains_a_dictionary_for_every_layer(workplace, tmp_path):
    # What the machine and the run's length decide; places, kind and everything else are the recipe's own.
    changes = {
        "--model": workplace / "model", "--data": workplace / "train.txt", "--num_features": 64, "--k": 4,
        "--max_tokens": 128, "--per_device_train_batch_size": 64, "--sequence_length": 16, "--eval_tokens": 64,
        "--eval_loss_tokens": 32, "--dtype": "float32", "--report_to": "none", "--output_dir": tmp_path,
    }  # fmt: skip
    command = ["train", "--config", str(CONFIG), "--use_cpu", "--disable_tqdm", "True"]
    assert main([*command, *(str(word) for pair in changes.items() for word in pair)]) == 0
    trained = TranscoderSet.from_pretrained(tmp_path)
    assert sites_of(trained) == SITES
    assert {d.config.training_summary["tokens"] for d in trained.values()} == {128}
    assert {d.config.training_summary["learning_rate"] for d in trained.values()} == {2e-3}
    assert json.loads((tmp_path / "evaluation.json").read_text())["dictionaries"].keys() == set(trained)


def test_the_script_ends_in_the_whole_model_table(workplace, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("train_every_layer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = {
        "--model": workplace / "model", "--data": workplace / "train.txt", "--num-features": 64, "--k": 4,
        "--max-tokens": 128, "--batch-tokens": 64, "--eval-tokens": 64, "--eval-loss-tokens": 32,
        "--output-dir": tmp_path,
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *(str(word) for pair in arguments.items() for word in pair)])
    module.main()
    assert sites_of(TranscoderSet.from_pretrained(tmp_path)) == SITES
    report = EvaluationReport.load_json(tmp_path / "evaluation.json")
    whole = [format_number(report.together[metric]) for metric in REPLACEMENT_METRICS]
    printed, card = capsys.readouterr().out, (tmp_path / "README.md").read_text()
    assert [TOGETHER.split() + whole] == [
        line.split() for line in printed.splitlines() if line.startswith(TOGETHER) and " - " not in line
    ]
    assert f"| {TOGETHER} | {' | '.join(whole)} |" in card and METRICS["ce_mean_ablated"] in printed
