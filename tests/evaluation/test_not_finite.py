"""An evaluation with numbers that are none says so wherever it is shown or kept."""

import json

import pytest
import torch

from hf_transcoders import TranscoderConfig, TranscoderModel
from hf_transcoders.evaluation import EvaluationReport, TranscoderEvaluator
from hf_transcoders.hub import make_card
from hf_transcoders.reports import render_report
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama")


def report_of(base, weight, monkeypatch):
    config = TranscoderConfig.for_model(base, "layers.1.mlp.in", "layers.1.mlp.branch", num_features=32, k=4)
    model = TranscoderModel(config).eval()
    with torch.no_grad():
        model.W_dec.fill_(weight)
    said = []
    monkeypatch.setattr("hf_transcoders.evaluation.evaluator.logger.warning", said.append)
    rows = [{"input_ids": torch.randint(3, 90, (12,)).tolist()} for _ in range(3)]
    return model, TranscoderEvaluator(base, rows, progress=False).evaluate({"a": model}), said


def test_it_says_so_everywhere(base, monkeypatch, tmp_path):
    model, report, said = report_of(base, float("nan"), monkeypatch)
    assert said == report.warnings and len(said) == 1 and "MSE" in said[0].upper()
    for text in (report.to_text(), report.markdown(), render_report(title="x", report=report)):
        assert "no finite" in text
    report.save_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert content["warnings"] == said
    assert EvaluationReport.load_json(tmp_path / "report.json").warnings == said
    assert "no finite" in make_card({"a": model}, report=report).text


def test_nothing_is_said_of_finite_ones(base, monkeypatch):
    model, report, said = report_of(base, 0.1, monkeypatch)
    assert report.warnings == [] and not said
    assert "no finite" not in report.to_text() and "warnings" not in report.to_dict()
