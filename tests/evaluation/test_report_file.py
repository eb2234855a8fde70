"""Reports from anywhere: what loads can be printed, drawn and put on a card; everything else is one sentence."""

import json

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_transcoders.errors import TranscoderError
from hf_transcoders.evaluation.drift import DriftProbe
from hf_transcoders.evaluation.evaluation_report import EvaluationReport
from hf_transcoders.reports import pareto_fronts, write_report
from hf_transcoders.reports.pareto.fronts import measured_in
from tests.evaluation.test_drift import base, dictionaries, probe_of, rows, tokenizer  # noqa: F401
from tests.mutations import mutate_json, mutate_tensors
from tests.reports.test_page import make_report


def use(report, folder):
    report.to_text().encode()
    report.markdown().encode()
    write_report(folder / "report.html", title="x", report=report)
    pareto_fronts(measured_in(report, "run"))
    report.save_json(folder / "again.json")
    for name in report.dictionaries:
        report.of(name)


def test_mutated_reports_are_refused_or_usable(tmp_path):
    path = tmp_path / "report.json"
    contents = [
        make_report().to_dict(),
        make_report(names=("a", "b", "c", "d", "e")).to_dict(),
        make_report(together=False).to_dict(),
    ]
    refused = 0
    for seed in range(150):
        path.write_text(json.dumps(mutate_json(contents[seed % 3], seed)))
        try:
            report = EvaluationReport.load_json(path)
        except TranscoderError as error:
            refused += 1
            assert str(error).isprintable()
        else:
            use(report, tmp_path)
    assert 75 < refused < 150


@pytest.mark.parametrize(
    "content",
    [
        b'{"dictionaries": {', b"\xff", b"[]", b'{"x": 1}', b'{"dictionaries": [], "protocol": {}}', b"null", b"[" * 10**5,
        b'{"dictionaries": {"a": {"metrics": {"l0": "x"}, "config": {}, "density_histogram": {}}}, "protocol": {}}',
        b'{"dictionaries": {}, "protocol": {}, "together": NaN}',
    ],
)  # fmt: skip
def test_what_is_no_report_is_one_sentence(tmp_path, content):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(TranscoderError, match=r"^[^\n]*report\.json[^\n]*\.$"):
        EvaluationReport.load_json(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("metric", "value"),
    [("l0", -1), ("dead_fraction", -0.5), ("fvu", True), ("l0", 1e300), ("kl", "0"), ("l0", 10**40)],
)
def test_numbers_out_of_range_are_refused(tmp_path, metric, value):
    content = make_report().to_dict()
    content["dictionaries"]["layers.8.mlp.transcoder"]["metrics"][metric] = value
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(TranscoderError, match=f"'{metric}'"):
        EvaluationReport.load_json(tmp_path / "report.json")


def test_mutated_baselines_are_refused_or_usable(base, dictionaries, rows, tokenizer, tmp_path):  # noqa: F811
    path = tmp_path / "baseline.safetensors"
    rows = rows[:8]
    probe_of(base, dictionaries, rows, tokenizer=tokenizer).save_baseline(path)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    tensors = load_file(path)
    probe = DriftProbe(dictionaries, rows, tokenizer=tokenizer, max_kl_tokens=64)
    probe.load_baseline(path)
    now = probe._measure(base)
    refused = 0
    for seed in range(30):
        changed = mutate_json(facts, seed) if seed % 2 else facts
        save_file(tensors if seed % 2 else mutate_tensors(tensors, seed), path, {"facts": json.dumps(changed)})
        try:
            probe.load_baseline(path)
        except TranscoderError as error:
            refused += 1
            assert str(error).isprintable()
        else:
            probe._report(now).to_text().encode()
    assert 12 < refused < 30
