"""Effects, intervals and files of a result."""

import csv
import json

import pytest
import torch

from hf_transcoders import TranscoderError
from hf_transcoders.circuits.patching import PatchResult


def result(source=True):
    values = torch.tensor([[[1.0, 3.0], [2.0, 4.0]], [[5.0, 5.0], [float("nan"), 1.0]]])
    return PatchResult(
        values,
        base=torch.tensor([1.0, 3.0]),
        source=torch.tensor([-1.0, -3.0]) if source else None,
        axes={"layer": ["0", "1"], "head": ["0", "1"]},
        metric="logit_difference",
        protocol={"ablation": "counterfactual"},
    )


def test_effects_are_shares_of_the_way_to_the_source():
    torch.testing.assert_close(result().effects[0], torch.tensor([0.0, -0.25], dtype=torch.float64))
    assert result().effects[1, 0] == -0.75
    assert result(source=False).effects[1, 0] == 3.0


def test_top_orders_by_magnitude_or_sign_and_leaves_out_nan():
    assert result().top(2) == [
        {"layer": "1", "head": "0", "effect": -0.75},
        {"layer": "0", "head": "1", "effect": -0.25},
    ]
    assert result().top(1, largest=True) == [{"layer": "0", "head": "0", "effect": 0.0}]
    assert result().top(1, largest=False)[0]["effect"] == -0.75


def test_intervals_are_those_of_resampled_prompts():
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(1, 400, generator=generator)
    many = PatchResult(change + 5, torch.full((400,), 5.0), None, {"layer": ["0"]}, "m")
    low, high = many.intervals(resamples=2000)
    error = change.std() / 20
    assert low.item() == pytest.approx((change.mean() - 1.96 * error).item(), abs=0.01)
    assert high.item() == pytest.approx((change.mean() + 1.96 * error).item(), abs=0.01)
    # If the change is the same share of the way in every prompt, the interval has no width.
    base, source = torch.rand(2, 50, generator=generator)
    certain = PatchResult((base + 0.3 * (source - base))[None], base, source, {"layer": ["0"]}, "m")
    expected = torch.full((2, 1), 0.3, dtype=torch.float64)
    torch.testing.assert_close(torch.stack(certain.intervals()), expected, rtol=1e-5, atol=0)
    with pytest.raises(TranscoderError, match="confidence"):
        many.intervals(confidence=95)


def test_files_hold_everything(tmp_path):
    for each in (result(), result(source=False)):
        each.to_json(tmp_path / "result.json")
        again = PatchResult.from_json(tmp_path / "result.json")
        assert again.to_dict() == each.to_dict()
        torch.testing.assert_close(again.values, each.values, equal_nan=True, rtol=0, atol=0)
    assert json.loads((tmp_path / "result.json").read_text())["protocol"] == {"ablation": "counterfactual"}
    result().to_csv(tmp_path / "result.csv")
    with open(tmp_path / "result.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["head"] for row in rows] == ["0", "1", "0", "1"]
    assert float(rows[1]["effect"]) == -0.25 and float(rows[1]["logit_difference"]) == 3.0
