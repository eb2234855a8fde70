"""Aliases are given where definitions agree, and not where they do not."""

import math
from pathlib import Path

import pytest
import torch

from hf_transcoders.evaluation import FeatureStatistics, ReconstructionStatistics
from hf_transcoders.tracking import AlertThresholds
from hf_transcoders.tracking.alerts import AlertWatch
from hf_transcoders.tracking.names import ALIASED, DICTIONARY_METRICS, RICH_RECORDS, RUN_METRICS, aliases


VALUES = {"train/learning_rate": 0.1, "train/tokens": 64}
for _name in ("a", "b"):
    VALUES |= {f"train/{_name}/{metric}": ord(_name) for metric in ("fvu", "explained_variance", "l0", "mse")}
    VALUES[f"train/{_name}/dead_fraction"] = 0.25


def test_aliases_of_one_dictionary_and_of_several():
    one = {name: value for name, value in VALUES.items() if "/b/" not in name}
    assert aliases(one, "saelens", ["a"]) == {
        "metrics/explained_variance": 97, "metrics/l0": 97, "details/current_learning_rate": 0.1,
        "details/n_training_samples": 64,
    }  # fmt: skip
    assert aliases(one, "sparsify", ["a"]) == {"fvu/a": 97, "dead_pct/a": 0.25}
    assert aliases(one, "dictionary_learning", ["a"]) == {"l0": 97}
    assert aliases(VALUES, "sparsify", ["a", "b"])["fvu/b"] == 98
    assert aliases(VALUES, "dictionary_learning", ["a", "b"]) == {"a/l0": 97, "b/l0": 98}


def test_only_known_libraries_are_aliased_and_similar_numbers_are_explained():
    for metric in (*DICTIONARY_METRICS, *RUN_METRICS):
        assert set(metric.aliases) <= set(ALIASED)
    differs = {metric.name: metric.differs for metric in DICTIONARY_METRICS}
    assert "sums over dimensions" in differs["mse"] and "centers the errors" in differs["explained_variance"]


def test_the_aliased_definitions_agree_in_numbers():
    """The other libraries' formulas, written out, on one batch."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(50, 8, generator=generator) + 1
    reconstruction = targets + 0.3 * torch.randn(50, 8, generator=generator) + 0.5
    features = torch.randn(50, 16, generator=generator).relu()
    ours = ReconstructionStatistics(8)
    ours.update(targets, reconstruction)
    fidelity = ours.compute()
    sparsity = FeatureStatistics(16)
    sparsity.update(features)

    error = (targets - reconstruction).square()
    total = (targets - targets.mean(0)).square()
    # sparsify `fvu`; sae-lens `explained_variance`; both libraries' `l0`.
    assert fidelity["fvu"] == pytest.approx((error.sum() / total.sum()).item(), rel=1e-6)
    sae_lens = 1 - error.sum(-1).mean() / total.sum(-1).mean()
    assert fidelity["explained_variance"] == pytest.approx(sae_lens.item(), rel=1e-5)
    assert sparsity.compute()["l0"] == pytest.approx((features != 0).float().sum(-1).mean().item(), rel=1e-6)
    # Those without an alias are other numbers.
    frac_variance_explained = 1 - torch.var(targets - reconstruction, dim=0).sum() / torch.var(targets, dim=0).sum()
    assert abs(frac_variance_explained.item() - fidelity["explained_variance"]) > 0.1
    assert error.sum(-1).mean().item() == pytest.approx(8 * fidelity["mse"], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- alerts


def watched(values, metric="a/mse", **thresholds):
    watch = AlertWatch(AlertThresholds(**thresholds))
    return [
        (alert.title, step)
        for step, value in enumerate(values, 1)
        for alert in watch.check(step, {f"train/{metric}": value})
    ]


def test_a_spike_is_far_above_the_median_and_alerts_each_time_it_begins():
    steady = [1.0, 1.1, 0.9, 1.0, 1.2]
    assert watched([*steady, 2.9]) == []
    assert watched([*steady, 3.1, 3.2]) == [("Loss spike", 6)]
    assert watched([*steady, 9.0, 1.0, 9.0]) == [("Loss spike", 6), ("Loss spike", 8)]
    assert watched([1.0, 1.0, 1.0, 1.0, 9.0]) == []  # too little to compare with
    assert watched([5 * 0.5**i for i in range(20)]) == []


def test_dead_features_alert_on_a_rise_not_on_a_level():
    assert watched([0.5] * 20, "a/dead_fraction") == []
    assert watched([0.01 * i for i in range(60)], "a/dead_fraction") == []  # a creep
    assert watched([0.0, 0.0, 0.19, 0.21, 0.6, 0.6], "a/dead_fraction") == [("Dead features", 4)]


def test_not_finite_alerts_once_over_both_metrics():
    watch = AlertWatch(AlertThresholds())
    both = [
        watch.check(step, {"train/a/loss": loss, "train/a/fvu": fvu})
        for step, (loss, fvu) in enumerate(
            [(1.0, 1.0), (1.0, math.nan), (math.inf, math.nan), (1.0, 1.0), (1.0, math.nan)]
        )
    ]
    assert [len(alerts) for alerts in both] == [0, 1, 0, 0, 1]
    assert both[1][0].level == "error" and "fvu is nan in a at step 1" in both[1][0].text


def test_a_continued_run_does_not_report_again():
    lines = [{"step": i, "time": "t", "train/a/fvu": None if i > 2 else 1.0, "train/a/mse": 1.0} for i in range(6)]
    watch = AlertWatch(AlertThresholds())
    watch.replay(lines)
    assert watch.check(7, {"train/a/fvu": math.nan, "train/a/mse": 1.0}) == []
    (spike,) = watch.check(8, {"train/a/fvu": math.nan, "train/a/mse": 4.0})
    assert spike.title == "Loss spike"


def test_warm_up_is_no_spike():
    watch = AlertWatch(AlertThresholds(), quiet_steps=8)
    values = [0.1 * 2**i for i in range(8)] + [25.0] * 8
    assert [alert for step, value in enumerate(values, 1) for alert in watch.check(step, {"train/a/mse": value})] == []


def test_the_documentation_lists_every_name():
    text = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text()
    for metric in (*DICTIONARY_METRICS, *RUN_METRICS):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{metric.name}` | {metric.meaning}"))
        assert all(f"`{alias}`" in row for alias in metric.aliases.values()) and metric.differs in row
    assert all(f"| `{name}` | {meaning} |" in text for name, meaning in RICH_RECORDS.items())
