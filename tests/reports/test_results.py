"""Folders of results: strict JSON, a page and pictures."""

import json
import math

from hf_transcoders.reports.lines import LineChart
from hf_transcoders.reports.results_folder import write_results
from hf_transcoders.reports.sections import Heatmap, Section, Table


def test_a_folder_holds_page_numbers_and_pictures(tmp_path):
    results = {"faithfulness": math.inf, "parts": [math.nan, 0.5], "task": "<ioi>"}
    pictures = {
        "effects": Heatmap("effects", [[0.5, math.nan]], ["0"], ["0", "1"]),
        "curve": LineChart("curve", "k", "score", {"a": [(0, 0.0), (1, 1.0)]}),
    }
    section = Section("What was found", tables=[Table("Numbers", ["name", "value"], [["<b>", math.inf]])])
    page = write_results(tmp_path / "new" / "folder", "A <title>", [section], {"seed": 0}, results, pictures)
    assert {path.name for path in page.parent.iterdir()} == {"report.html", "results.json", "effects.png", "curve.png"}
    text = (page.parent / "results.json").read_text()

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(text, parse_constant=refuse) == {"faithfulness": None, "parts": [None, 0.5], "task": "<ioi>"}
    html = page.read_text()
    assert "A &lt;title&gt;" in html and "&lt;b&gt;" in html and '<td class="short">–</td>' in html
    assert html.startswith("<!DOCTYPE html>") and html.count("<head>") == html.count("</style>") == 1
