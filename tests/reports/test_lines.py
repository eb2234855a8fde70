"""Curves: what is drawn where, escaped, and what cannot be drawn."""

import re

import pytest

from hf_transcoders import TranscoderError
from hf_transcoders.reports.lines import LineChart, write_lines_png
from hf_transcoders.reports.sections import Table, tables_text


def chart(**changes):
    settings = {"series": {"a <b>": [(0, 0.0), (1, 0.5), (2, 1.0)]}, "levels": {"all": 0.25}}
    return LineChart("A & B", "k", "score", **{**settings, **changes})


def test_points_lie_where_the_axes_say():
    svg = chart().svg()
    assert "<b>" not in svg and "a &lt;b&gt;" in svg and "A &amp; B" in svg
    curve, level = (
        [tuple(map(float, point.split(","))) for point in path.split()]
        for path in re.findall(r'<polyline points="([^"]+)"', svg)
    )
    (x0, y0), (x1, y1), (x2, y2) = curve
    assert x0 < x1 < x2 and x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 > y1 > y2 and y1 - y2 == pytest.approx(y0 - y1, abs=0.2)
    assert [x for x, _ in level] == [x0, x2] and level[0][1] == level[1][1]
    assert level[0][1] == pytest.approx((y0 + y1) / 2, abs=0.2)


def test_png_is_written_and_a_single_point_is_refused(tmp_path):
    assert write_lines_png(tmp_path / "lines.png", chart()).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(TranscoderError, match="fewer than two points"):
        chart(series={"a": [(0, 1.0)]})


def test_tables_as_text_are_aligned_and_command_no_terminal():
    text = tables_text([Table("First", ["name", "value"], [["a\x1b[2J", 0.5], ["longer name", None]], "A note.")])
    assert text.splitlines() == ["First", "name         value", "a\\x1b[2J     0.5", "longer name  –", "A note."]
