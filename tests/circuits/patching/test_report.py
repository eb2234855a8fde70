"""Folders of patching results: page, heatmap and files have the same numbers."""

import json

import pytest

from hf_transcoders.circuits.patching import Patching, PatchResult, result_heatmap, save_patch
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
