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
    assert "fvu" in report.not_finite()["a"] and "ce_original" not in report.not_finite()["a"]
    assert len(said) == 1 and "fvu" in said[0] and "do not rely on it" in said[0]
    shown = "FVU"
    for text in (report.table(), report.markdown(), render_report(title="x", report=report)):
        assert "NOT FINITE" in text.replace("\\_", "_") and shown in text.split("NOT FINITE")[1]
    report.save_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert "fvu" in content["protocol"]["not_finite"]["a"]
    assert EvaluationReport.load_json(tmp_path / "report.json").not_finite() == report.not_finite()
    assert "NOT FINITE" in make_card({"a": model}, report=report).text


def test_nothing_is_said_of_finite_ones(base, monkeypatch):
    model, report, said = report_of(base, 0.1, monkeypatch)
    assert not report.not_finite() and not said
    assert "NOT FINITE" not in report.table() and "not_finite" not in report.to_dict()["protocol"]
