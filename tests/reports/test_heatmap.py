"""Heatmaps: every number on the page, nothing executable, and a picture with the right cells."""

import re

import pytest

from hf_transcoders import TranscoderError
from hf_transcoders.reports.heatmap_png import write_png
from hf_transcoders.reports.heatmap_svg import attention_svg, heatmap_svg
from hf_transcoders.reports.results_folder import write_page
from hf_transcoders.reports.sections import AttentionView, Heatmap, Section, Table


VALUES = [[0.5, -0.25, None], [float("nan"), 0.0, 0.125]]


def heatmap(**changes):
    return Heatmap(**{"title": "effects", "values": VALUES, "rows": ["0", "1"], "columns": ["0", "1", "2"], **changes})


def test_each_cell_tells_its_number_interval_and_mark():
    low = [[0.4, -0.3, None], [None, -0.1, 0.1]]
    high = [[0.6, -0.2, None], [None, 0.1, 0.15]]
    svg = heatmap_svg(heatmap(low=low, high=high, marks={(0, 1): "mover"}))
    titles = re.findall(r"<title>(.*?)</title>", svg)
    assert titles == [
        "layer 0, head 0: 0.5 [0.4, 0.6]",
        "layer 0, head 1: -0.25 [-0.3, -0.2] · mover",
        "layer 0, head 2: – [–, –]",
        "layer 1, head 0: – [–, –]",
        "layer 1, head 1: 0 [-0.1, 0.1]",
        "layer 1, head 2: 0.125 [0.1, 0.15]",
    ]
    # Colour is the sign and opacity the share of the greatest magnitude.
    cells = re.findall(r'fill="(#\w+|currentColor)" fill-opacity="([\d.]+)"[^>]*><title>', svg)
    assert cells[0] == ("#e8590c", "1.000") and cells[1] == ("#1c7ed6", "0.500") and cells[5][1] == "0.250"
    assert cells[2] == ("currentColor", "0.120")


def test_texts_are_escaped(tmp_path):
    bad = "<script>alert('x')</script>"
    page = write_page(
        tmp_path / "page.html",
        bad,
        [
            Section(
                bad,
                bad,
                [Table(bad, [bad], [[bad]], bad)],
                [heatmap(title=bad, columns=[bad, "b", "c"], marks={(0, 0): bad}, note=bad, protocol={bad: bad})],
                [AttentionView(bad, [bad, "b"], [[1.0, 0.0], [0.5, 0.5]])],
            )
        ],
        {bad: bad},
    ).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") > 10
    assert not re.search(r"https?://(?!www\.w3\.org)", page)


def test_attention_tells_every_share_and_the_last_row_on_the_text(tmp_path):
    view = AttentionView("head", ["a\n", " b", " c"], [[1.0, 0, 0], [0.25, 0.75, 0], [0.1, 0.2, 0.7]])
    titles = re.findall(r"<title>(.*?)</title>", attention_svg(view))
    assert titles == [
        "a⏎ → a⏎: 1.0000", "␣b → a⏎: 0.2500", "␣b → ␣b: 0.7500", "␣c → a⏎: 0.1000", "␣c → ␣b: 0.2000", "␣c → ␣c: 0.7000",
    ]  # fmt: skip
    page = write_page(tmp_path / "page.html", "t", [Section("s", attention=[view])]).read_text()
    assert re.findall(r'--a:([\d.]+)"', page) == ["0.100", "0.200", "0.700"]


def test_a_table_that_does_not_fit_is_refused():
    with pytest.raises(TranscoderError, match="2 rows of 2 numbers"):
        heatmap(columns=["0", "1"])


def test_png_has_the_colors_of_the_cells(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import colormaps
    from matplotlib.image import imread

    path = write_png(
        tmp_path / "map.png", heatmap(title="costs $5 or $6", protocol={"model": "a $b$"}, marks={(1, 1): "x"})
    )
    pixels = imread(path)[..., :3].reshape(-1, 3).round(decimals=2)
    colors = {tuple(pixel.tolist()) for pixel in pixels}
    for value in (0.5, -0.25, 0.125):
        expected = colormaps["RdBu_r"](value + 0.5)[:3]
        assert any(all(abs(a - b) < 0.02 for a, b in zip(color, expected, strict=True)) for color in colors)
