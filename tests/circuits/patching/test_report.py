"""Folders of patching results: page, heatmap and files have the same numbers."""

import json
from dataclasses import replace

import pytest
import torch
from markupsafe import escape

from hf_transcoders.circuits.patching import Patching, PatchResult, result_heatmap, save_patch
from hf_transcoders.circuits.patching.report import run_rows
from hf_transcoders.tasks import task_performance
from tests.circuits.patching.brute_force import tiny_task
from tests.circuits.patching.test_results import result
from tests.tiny_models import tiny_model


def test_a_heatmap_has_effects_intervals_and_marks():
    found = result_heatmap(result(), "title", {(1, 0): "mover"})
    low, high = result().intervals()
    assert found.values[1][0] == -0.75 and found.marks == {(1, 0): "mover"}
    assert found.low[0] == low[0].tolist() and found.high[0] == high[0].tolist()
    assert found.note.startswith("Share of the way")
    ablated = result_heatmap(result(source=False), "title")
    assert ablated.note.startswith("Change of logit difference") and not ablated.marks


def test_the_page_lists_the_strongest_places_with_their_intervals(tmp_path):
    found = Patching(tiny_model("llama"), tiny_task()).residual(["S", "END"])
    page = save_patch(found, tmp_path / "out").read_text()
    assert PatchResult.from_json(tmp_path / "out" / "results.json").to_dict() == json.loads(
        json.dumps(found.to_dict())
    )
    low, high = found.intervals()
    strongest = found.top(1)[0]
    at = tuple(found.axes[axis].index(strongest[axis]) for axis in found.axes)
    assert found.effects[at].item() == pytest.approx(strongest["effect"])
    numbers = [f"{number:.4g}" for number in (strongest["effect"], low[at].item(), high[at].item())]
    cells = [strongest["layer"], strongest["position"], *numbers]
    assert "".join(f'<td class="short">{cell}</td>' for cell in cells) in page


def test_a_model_that_cannot_do_the_task_is_said_so_before_any_effect(tmp_path):
    model, task = tiny_model("llama"), tiny_task()
    found = Patching(model, task).residual(["S", "END"])
    # Base and source runs that do not differ.
    found = replace(found, source=found.base + torch.tensor([0.01, -0.01] * len(found.base))[: len(found.base)])
    performance = task_performance(model, task)
    assert performance.warning and "The model does not do the task" in performance.warning
    assert found.warning and "includes 0. Effects are shares" in found.warning
    page = save_patch(found, tmp_path / "out", performance=performance).read_text()
    order = [page.index(escape(text)) for text in (performance.warning, "The ten greatest effects")]
    assert order == sorted(order) and escape(found.warning) in page and 'role="alert"' in page
    scores = performance.measured["clean"]["logit_difference"]
    assert page.index(escape(str(scores))) < page.index("The ten greatest effects")
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["performance"]["warning"] == performance.warning and saved["warning"] == found.warning
    assert PatchResult.from_json(tmp_path / "out" / "results.json").warning == found.warning
    assert "95% low" in page and run_rows(found)[0][0] == "base (clean prompts)"
