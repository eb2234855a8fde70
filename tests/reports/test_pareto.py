"""Pareto fronts: against brute force, never across protocols or jobs unasked, and as page, picture and table."""

import csv
import html.parser
import itertools
import math
import random
import re

import pytest

from hf_transcoders import TranscoderError
from hf_transcoders.evaluation.evaluation_report import METRICS
from hf_transcoders.reports import (
    MeasuredDictionary,
    pareto_front,
    pareto_fronts,
    save_pareto_csv,
    write_pareto,
    write_pareto_page,
)
from hf_transcoders.reports.pareto.caveats import warning
from hf_transcoders.reports.pareto.chart import Point, step_line
from hf_transcoders.reports.pareto.labels import place_labels, short_labels


EVIL = "<script>alert(1)</script>"
PROTOCOL = {
    "base_model": "me/base", "base_model_revision": None, "dataset": "docstrings", "dataset_split": None,
    "fidelity_tokens": 16384, "loss_tokens": 4096, "sequence_length": 128, "begins_with_bos": False, "skip_first": 1,
    "special_token_ids": [0, 1], "ablation": "zero and mean", "dtype": "float32",
    "versions": {"torch": "2"}, "device": "cpu",
}  # fmt: skip
READ, WRITE = "layers.8.mlp.in", "layers.8.mlp.branch"


def make(run="run", k=32, fvu=0.3, ce=0.95, read=READ, write=WRITE, name=None, protocol=PROTOCOL, **metrics):
    kind = "sae" if read == write else "transcoder"
    return MeasuredDictionary(
        run,
        name or f"layers.8.mlp.{kind}.topk{k}",
        {"l0": float(k), "fvu": fvu, "ce_recovered_zero": ce, "ce_recovered_mean": ce, **metrics},
        "evaluation",
        20,
        protocol,
        {"input_site": read, "output_site": write, "num_features": 4608, "activation": "topk", "k": k},
    )


@pytest.mark.parametrize("higher", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_front_against_brute_force(higher, seed):
    generator = random.Random(seed)
    # Few values, so that there are ties in one number, in both, and equal points.
    points = [(generator.randint(1, 6) / 2, generator.randint(1, 6) / 4) for _ in range(generator.randint(0, 30))]

    def dominates(a, b):
        better = [a[0] - b[0], (b[1] - a[1]) if higher else (a[1] - b[1])]
        return max(better) <= 0 and min(better) < 0

    expected = [not any(dominates(other, point) for other in points) for point in points]
    assert pareto_front(points, higher) == expected


def test_the_step_line_is_the_edge_of_what_is_dominated():
    """A grid point lies right of and above the line exactly if some point of the front dominates or equals it."""
    generator = random.Random(3)
    values = [(generator.randint(0, 9), generator.randint(0, 9)) for _ in range(12)]
    front = pareto_front(values)
    line = step_line([Point(x, y, "", "", on) for (x, y), on in zip(values, front, strict=True)])
    assert line[0] == min(v for v, on in zip(values, front, strict=True) if on)
    for (x1, y1), (x2, y2) in itertools.pairwise(line):
        assert (x1 == x2) != (y1 == y2) and x2 >= x1 and y2 <= y1
    for x, y in itertools.product(range(int(line[0][0]), int(line[-1][0]) + 1), range(10)):
        height = min(y1 for x1, y1 in line if x1 <= x)
        assert (y >= height) == any(a <= x and b <= y for (a, b), on in zip(values, front, strict=True) if on)


def test_each_job_and_each_protocol_has_its_own_front():
    other = {**PROTOCOL, "dataset": "wikitext"}
    dictionaries = [
        make(k=16, fvu=0.4),
        make(k=32, fvu=0.5, name="worse"),
        make(k=64, fvu=0.2, read=WRITE, name="sae"),  # Reads what it writes: another job.
        make(k=8, fvu=0.1, protocol=other, name="elsewhere"),
        make(k=8, fvu=0.1, read="layers.9.mlp.in", write="layers.9.mlp.branch", name="layer9"),
    ]
    fronts = pareto_fronts(dictionaries)
    assert [[d.name for d in group.dictionaries] for group in fronts] == [
        ["sae", "layers.8.mlp.transcoder.topk16", "worse", "layer9"],
        ["elsewhere"],
    ]
    assert fronts[0].on_front["fvu"] == [True, True, False, True]
    assert [fronts[0].standing(i) for i in (1, 2)] == ["front", "dominated"]
    assert warning(fronts) == (
        "Measured in 2 different ways, each with separate fronts: data (docstrings / wikitext)."
    )
    (mixed,) = pareto_fronts(dictionaries, allow_mixed=True)
    assert dict(zip((d.name for d in mixed.dictionaries), mixed.on_front["fvu"], strict=True)) == {
        "sae": True, "elsewhere": True, "layers.8.mlp.transcoder.topk16": False, "worse": False, "layer9": True,
    }  # fmt: skip
    assert mixed.protocol is None and mixed.differences == {"data": ["docstrings", "wikitext"]}
    assert warning([mixed]).startswith("Measured in different ways, but put on one front: data")


@pytest.mark.parametrize("fact", ["dataset", "fidelity_tokens", "skip_first", "ablation", "special_token_ids"])
def test_every_fact_of_the_protocol_keeps_numbers_apart(fact):
    changed = {**PROTOCOL, fact: "another"}
    assert len(pareto_fronts([make(), make(protocol=changed)])) == 2
    # What does not change the numbers does not.
    assert len(pareto_fronts([make(), make(protocol={**PROTOCOL, "versions": {"torch": "3"}, "device": "cuda"})])) == 1


def test_unknown_protocols_are_never_taken_for_equal():
    dictionaries = [make("a", protocol=None), make("a", k=16, protocol=None), make("b", protocol=None)]
    assert [[d.run for d in group.dictionaries] for group in pareto_fronts(dictionaries)] == [["a", "a"], ["b"]]
    assert warning(pareto_fronts(dictionaries)) is not None
    assert warning(pareto_fronts(dictionaries[:2])) == "The protocol of these measurements was not recorded."


def test_layers_are_in_the_order_of_their_numbers():
    dictionaries = [make(write=f"layers.{i}.mlp.branch", name=str(i)) for i in (10, 9, 2)]
    assert [d.name for d in pareto_fronts(dictionaries)[0].dictionaries] == ["2", "9", "10"]


def test_what_was_not_measured_is_on_no_front(tmp_path):
    dictionaries = [make(k=8, ce=math.nan, name="nan"), make(k=16, ce=None, name="none"), make(k=32)]
    (group,) = pareto_fronts(dictionaries)
    assert group.on_front["ce_recovered_zero"] == [None, None, True]
    with pytest.raises(TranscoderError, match="nothing to draw"):
        write_pareto_page(tmp_path / "page.html", pareto_fronts([make(fvu=None, ce=None)]), title="t")
    with pytest.raises(TranscoderError, match="nothing to draw"):
        write_pareto_page(tmp_path / "page.html", [], title="t")
    assert not list(tmp_path.iterdir())


def sweep_of(run="run", protocol=PROTOCOL):
    return [
        make(run, k=k, fvu=1 / k**0.3 * (1 if n == 4608 else 1.2), ce=0.9 + k / 1000 - (n == 2304) / 99,
             name=f"layers.8.mlp.transcoder.topk{k}.n{n}", protocol=protocol, kl=0.1, dead_fraction=0.0)
        for k in (16, 32, 64) for n in (2304, 4608)
    ]  # fmt: skip


def test_csv_reads_back_with_the_same_numbers(tmp_path):
    generator = random.Random(1)
    dictionaries = [make(name=f'"{i}",\n=x', k=i, fvu=generator.random(), ce=generator.random()) for i in range(1, 9)]
    dictionaries.append(make(name="without", ce=None))
    fronts = pareto_fronts(dictionaries)
    path = save_pareto_csv(tmp_path / "fronts.csv", fronts)
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["dictionary"] for row in rows] == [d.name for d in fronts[0].dictionaries]
    for i, (row, dictionary) in enumerate(zip(rows, fronts[0].dictionaries, strict=True)):
        for metric in METRICS:
            value = dictionary.metrics.get(metric)
            assert row[metric] == "" if value is None else float(row[metric]) == value
        assert row["on_front_fvu"] == str(fronts[0].on_front["fvu"][i])
        assert (row["dataset"], row["fidelity_tokens"], row["run"]) == ("docstrings", "16384", "run")


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.style = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.style = tag == "style"

    def handle_data(self, data):
        self.text += "" if self.style else data


def test_page_escapes_and_asks_nothing_of_the_outside(tmp_path):
    protocol = {**PROTOCOL, "dataset": EVIL}
    dictionaries = [make(EVIL, name=EVIL, protocol=protocol), make("b", k=16, name='" onload="x', read=EVIL)]
    text = write_pareto_page(tmp_path / "page.html", pareto_fronts(dictionaries), title=EVIL, notes=[EVIL]).read_text()
    page = Page(text)
    assert not any(
        tag in ("script", "img", "iframe", "object", "link") for tag, a in page.tags if a.get("rel") != "icon"
    )
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(EVIL) >= 5
    assert set(re.findall(r"(?:https?:)?//[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def test_page_shows_fronts_numbers_and_protocol(tmp_path):
    text = write_pareto_page(tmp_path / "page.html", pareto_fronts(sweep_of()), title="t").read_text()
    page = Page(text)
    assert sum(tag == "svg" for tag, _ in page.tags) == 2
    # The wider dictionary wins at each sparsity, in both charts.
    assert text.count('<g opacity="1.0">') == text.count('<g opacity="0.35">') == 6
    assert sum(a.get("class") == "dominated" for tag, a in page.tags if tag == "tr") == 3
    for fact in ("docstrings", "16,384", "evaluation, step 20", "topk64 n4608", "4,608"):
        assert fact in page.text
    assert "warning" not in [a.get("class") for _, a in page.tags]
    other = sweep_of("two", {**PROTOCOL, "skip_first": 0})
    page = Page(write_pareto_page(tmp_path / "two.html", pareto_fronts(sweep_of() + other), title="t").read_text())
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert "positions left out at the start (1 / 0)" in page.text


def test_points_are_drawn_where_the_axis_says(tmp_path):
    text = write_pareto_page(tmp_path / "page.html", pareto_fronts(sweep_of()), title="t").read_text()
    svg = text[text.index("<svg") : text.index("</svg>")]
    circles = {
        title: (float(x), float(y))
        for x, y, title in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)".*?\n?<title>run: ([^:]+):', svg)
    }
    ticks = {
        text: float(x) for x, text in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">(\d+)<', svg)
    }
    for k in (16, 32, 64):
        assert circles[f"layers.8.mlp.transcoder.topk{k}.n4608"][0] == pytest.approx(ticks[str(k)], abs=0.15)
    heights = [circles[f"layers.8.mlp.transcoder.topk{k}.n4608"][1] for k in (16, 32, 64)]
    fvus = [1 / k**0.3 for k in (16, 32, 64)]
    assert (heights[1] - heights[0]) / (heights[2] - heights[0]) == pytest.approx(
        (fvus[1] - fvus[0]) / (fvus[2] - fvus[0]), abs=2e-3
    )


def test_png_csv_and_page_are_written_and_odd_names_do_no_harm(tmp_path):
    pytest.importorskip("matplotlib")
    odd = make("$\\frac{", k=16, name="_$x^{$", read=r"module:$\alpha:in")
    files = write_pareto(tmp_path / "out.v1" / "fronts", pareto_fronts([odd, *sweep_of()]), title="$_{", csv=True)
    assert [file.name for file in files] == ["fronts.html", "fronts.png", "fronts.csv"]
    data = files[1].read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width == 1560 and 600 < height < 800
    assert sorted(file.name for file in files[0].parent.iterdir()) == ["fronts.csv", "fronts.html", "fronts.png"]


@pytest.mark.parametrize("seed", range(5))
def test_labels_cover_neither_each_other_nor_points_nor_lines(seed):
    generator = random.Random(seed)
    points = [(generator.uniform(60, 500), generator.uniform(40, 300), f"topk{i} n4608") for i in range(14)]
    lines = [[(100.0, 120.0), (400.0, 120.0), (400.0, 250.0)]]
    bounds, size = (54, 26, 506, 316), 10.5
    placed = place_labels(points, bounds, size, lines)
    boxes = [
        (x, y - size, x + 0.56 * size * len(text), y)
        for place, (_, _, text) in zip(placed, points, strict=True) if place is not None for x, y in [place]
    ]  # fmt: skip
    assert len(boxes) >= 10

    def apart(a, b):
        return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]

    assert all(apart(a, b) for a, b in itertools.combinations(boxes, 2))
    assert all(apart(box, (x - 5, y - 5, x + 5, y + 5)) for box in boxes for x, y, _ in points)
    assert all(apart(box, segment) for box in boxes for segment in ((100, 120, 400, 120), (400, 120, 400, 250)))
    assert all(b[0] >= bounds[0] and b[1] >= bounds[1] and b[2] <= bounds[2] and b[3] <= bounds[3] for b in boxes)


def test_labels_say_what_differs():
    assert short_labels([("r", "layers.8.mlp.transcoder.topk16.n4608"), ("r", "layers.8.mlp.transcoder.topk32.n4608")]) == [
        "topk16", "topk32",
    ]  # fmt: skip
    assert short_labels([("a", "layers.8.mlp.transcoder"), ("b", "layers.8.mlp.transcoder")]) == ["a", "b"]
    assert short_labels([("a", "x.topk16"), ("b", "x.topk32")]) == ["a topk16", "b topk32"]
    assert short_labels([("a", "only")]) == ["only"]
    assert len(short_labels([("a", "x" * 99), ("a", "y")])[0]) == 30
