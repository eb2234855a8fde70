"""MLflow and Comet, where they are installed: a tiny run arrives in their own stores, without a server or account."""

import json
import os
import zipfile

import pytest

from hf_transcoders.tracking import Run

from .conftest import NAME


pytestmark = pytest.mark.slow
SETTINGS = {"logging_steps": 2, "eval_steps": 6}
#: Step of each log and evaluation of a run of twelve steps.
LOGS, EVALUATIONS = [2, 4, 6, 8, 10, 12], [6, 12]


def recorded(trainer, name):
    return [pytest.approx(value) for _, value in Run.load(trainer.args.output_dir).history(name)]


def test_mlflow_has_the_scalars(make_trainer, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    # MLflow 3 has a database as its default, and files only on demand.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    trainer = make_trainer(report_to="mlflow", **SETTINGS)
    trainer.train()
    mlflow.end_run()
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.info.status == "FINISHED"
    for name, ours, steps in ((f"{NAME}/fvu", "train", LOGS), (f"eval_{NAME}/fvu", "eval", EVALUATIONS)):
        found = client.get_metric_history(run.info.run_id, name)
        assert [metric.step for metric in found] == steps
        assert [metric.value for metric in found] == recorded(trainer, f"{ours}/{NAME}/fvu")


@pytest.mark.skipif(
    "COMET_API_KEY" not in os.environ, reason="Transformers uses Comet with a COMET_API_KEY only; any does"
)
def test_comet_offline_has_the_scalars(make_trainer, tmp_path, monkeypatch):
    comet_ml = pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_START_ONLINE", "0")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path / "comet"))
    trainer = make_trainer(report_to="comet_ml", **SETTINGS)
    trainer.train()
    comet_ml.end()
    (path,) = (tmp_path / "comet").glob("*.zip")
    lines = zipfile.ZipFile(path).read("messages.json").decode().splitlines()
    metrics = [each["payload"]["metric"] for each in map(json.loads, lines) if each["type"] == "metric_msg"]
    for subset, steps in (("train", LOGS), ("eval", EVALUATIONS)):
        found = [metric for metric in metrics if metric["metricName"] == f"{subset}/{NAME}/fvu"]
        assert [metric["step"] for metric in found] == steps
        assert [metric["metricValue"] for metric in found] == recorded(trainer, f"{subset}/{NAME}/fvu")
