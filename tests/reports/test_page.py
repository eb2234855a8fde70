import math
import re
from html.parser import HTMLParser

import pytest

from hf_transcoders.evaluation import EvaluationReport
from hf_transcoders.evaluation.evaluation_report import METRICS
from hf_transcoders.features import FeatureContext, FeatureExplanation
from hf_transcoders.reports import plots, write_report


EVIL = "<script>alert('x')</script>"


def make_report(names=("layers.8.mlp.transcoder", "layers.20.mlp.transcoder"), together=True):
    def entry(i):
        metrics = {name: 0.01 * (i + 1) + 0.02 * j for j, name in enumerate(METRICS)}
        metrics["l0"] = 16.0 * (i + 1)
        counts = [0] * 12
        counts[7 - i % 3], counts[8] = 30, 12 + i
        return {
            "metrics": metrics,
            "density_histogram": {
                "log10_edges": [-6 + edge / 2 for edge in range(13)],
                "counts": counts,
                "never_fired": 3,
            },
            "config": {
                "input_site": "layers.8.mlp.in",
                "output_site": "layers.8.mlp.branch",
                "num_features": 64,
                "activation": "topk",
                "k": 16,
            },
        }

    protocol = {
        "base_model": "me/base",
        "base_model_revision": "abc123",
        "dataset": "made up",
        "dataset_split": "test",
        "fidelity_tokens": 12345,
        "loss_tokens": 678,
        "sequence_length": 128,
        "begins_with_bos": True,
        "skip_first": 1,
        "special_token_ids": list(range(8)),
        "ablation": "zero and mean",
        "dtype": "float32",
        "device": "cpu",
        "versions": {"torch": "2.6"},
    }
    loss_metrics = dict.fromkeys(list(METRICS)[9:-1], 0.5) if together else None
    return EvaluationReport({name: entry(i) for i, name in enumerate(names)}, protocol, loss_metrics)


def make_feature(token="hit", index=7):
    context = FeatureContext(
        tokens=["before ", token, " after"], activations=[0.0, 4.0, 1.0], peak=1, row=0, position=9
    )
    return FeatureExplanation(index, 0.0123, 4.0, 2.5, [context], [(token, 1.5)], [("\n", -0.5)])


def make_history(names=("layers.8.mlp.transcoder", "layers.20.mlp.transcoder")):
    return [
        {
            "step": step,
            "tokens": 1000 * step,
            "learning_rate": 1e-3,
            **{f"{name}/fvu": 1 / (step + i) for i, name in enumerate(names)},
            **{f"{name}/l0": 32.0 for name in names},
        }
        for step in range(1, 6)
    ] + [{"eval_layers.8.mlp.transcoder/fvu": 0.3, "step": 5}, {"train_loss": 0.4, "step": 5}]


class Page(HTMLParser):
    """Tags with their attributes, the text, and every id; fails on tags that do not nest."""

    VOID = {"meta", "link", "br"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def write(tmp_path, **kwargs):
    path = write_report(tmp_path / "report.html", **{"title": "A run", **kwargs})
    assert list(tmp_path.iterdir()) == [path]
    return path.read_text()


def test_the_whole_page(tmp_path):
    report = make_report()
    html = write(
        tmp_path,
        history=make_history(),
        report=report,
        features={"layers.8.mlp.transcoder": [make_feature()]},
        info={"trained on": "5,000 tokens"},
    )
    page = Page(html)
    for text in ("A run", "5,000 tokens", "me/base @ abc123", "12,345", "Feature 7", "all together", "1.23"):
        assert text in page.text
    for heading in METRICS.values():
        assert heading in page.text
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert {link.removeprefix("#") for link in links} <= ids
    assert {"summary", "fidelity", "training", "metrics", "features"} <= ids
    # Three charts of the report, and FVU over tokens; a constant L0 is not worth one.
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert len(html) < 60_000


def test_the_page_asks_nothing_of_the_outside(tmp_path):
    html = write(tmp_path, history=make_history(), report=make_report(), features=None)
    outside = re.findall(r"(?:https?:)?//[^\s\"'<]+", html)
    assert set(outside) <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "url(" not in html and "@import" not in html
    for tag, attributes in Page(html).tags:
        assert tag not in ("script", "img", "iframe", "object", "embed")
        assert attributes.get("href", "#").startswith(("#", "data:,"))
        assert not any(name.startswith("on") for name in attributes)
    assert "default-src 'none'" in html


def test_text_from_outside_is_escaped(tmp_path):
    names = (EVIL, 'quote" onload="alert(1)')
    report = make_report(names)
    report.protocol["dataset"] = EVIL
    report.dictionaries[EVIL]["config"]["input_site"] = EVIL
    html = write(
        tmp_path,
        title=EVIL,
        history=make_history(names),
        report=report,
        features={EVIL: [make_feature(EVIL)], names[1]: [make_feature(names[1])]},
        info={EVIL: EVIL},
    )
    page = Page(html)
    assert not any(tag == "script" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(EVIL) >= 10  # it is there to be read, everywhere
    assert "<script" not in html.lower()


@pytest.mark.parametrize("left_out", ["history", "report", "features", "info", "all"])
def test_every_part_may_be_missing(tmp_path, left_out):
    parts = {
        "history": make_history(),
        "report": make_report(together=False),
        "features": {"layers.8.mlp.transcoder": [make_feature()]},
        "info": {"a": 1},
    }
    html = write(tmp_path, **({} if left_out == "all" else {k: v for k, v in parts.items() if k != left_out}))
    page = Page(html)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert ("training" in ids) == (left_out not in ("history", "all"))
    assert ("summary" in ids) == ("metrics" in ids) == (left_out not in ("report", "all"))
    assert ("features" in ids) == (left_out not in ("features", "all"))
    assert ("has no records" in page.text) == (left_out == "all")


def test_numbers_that_were_not_measured(tmp_path):
    report = make_report()
    metrics = report.dictionaries["layers.8.mlp.transcoder"]["metrics"]
    metrics["ce_recovered_zero"] = metrics["explained_variance"] = float("nan")
    metrics["fvu"] = float("inf")
    silent = FeatureExplanation(3, 0.0, 0.0, 0.0, [], [], [])
    text = Page(write(tmp_path, report=report, history=[{"step": 1, "a/fvu": float("nan")}], features=[silent])).text
    assert "Not active on" in text and "inf" in text


def test_broken_numbers_have_a_banner(tmp_path):
    report = make_report()
    assert "Do not trust" not in Page(write(tmp_path, report=report)).text
    report.dictionaries["layers.8.mlp.transcoder"]["metrics"]["mse"] = float("nan")
    page = Page(write(tmp_path, report=report))
    assert f"Do not trust these numbers. {report.warnings[0]}" in " ".join(page.text.split())
    assert ("p", "alert") in [(tag, attributes.get("role")) for tag, attributes in page.tags]


def test_many_dictionaries_are_rows(tmp_path):
    names = [f"layers.{i}.mlp.transcoder" for i in range(26)]
    page = Page(write(tmp_path, report=make_report(names), history=make_history(names)))
    scopes = [attributes["scope"] for tag, attributes in page.tags if tag == "th"]
    assert scopes.count("row") == 27 and scopes.count("col") == len(METRICS) + 1


def coordinates(svg, tag, attribute):
    return [
        [tuple(map(float, p.split(","))) for p in m.split()] for m in re.findall(rf'<{tag} {attribute}="([^"]+)"', svg)
    ]


def test_curves_are_drawn_where_the_axis_says():
    history = [{"tokens": tokens, "a/fvu": fvu} for tokens, fvu in ((0, 1.0), (500, 0.5), (1000, 0.0))]
    svg = plots.loss_curves(history, "fvu", "title", "FVU")
    ((start, middle, end),) = coordinates(svg, "polyline", "points")
    assert middle == (pytest.approx((start[0] + end[0]) / 2, abs=0.1), pytest.approx((start[1] + end[1]) / 2, abs=0.1))
    assert start[1] < end[1]  # SVG counts downwards
    labels = {
        text: (float(x), float(y)) for x, y, text in re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', svg)
    }
    assert labels["1k"][0] == pytest.approx(end[0], abs=0.1) and labels["200"][0] == pytest.approx(
        start[0] + (end[0] - start[0]) / 5, abs=0.1
    )
    assert labels["1"][1] - 4 == pytest.approx(start[1], abs=0.1)
    assert labels["0.2"][1] - 4 == pytest.approx(start[1] + 0.8 * (end[1] - start[1]), abs=0.1)


def test_the_histogram_has_the_counts_of_the_report():
    report = make_report(["only"])
    ((*points,),) = coordinates(plots.density_histogram(report), "polygon", "points")
    base = points[0][1]
    heights = [base - y for _, y in points[1:-1:2]]
    counts = report.dictionaries["only"]["density_histogram"]["counts"]
    assert [height / max(heights) for height in heights] == pytest.approx([c / max(counts) for c in counts], abs=1e-3)


@pytest.mark.parametrize("values", [(0, 1), (3.2, 3.2), (0, 0), (-5, -5), (1e-7, 3e-7), (12, 98765), (0.31, 0.36)])
def test_ticks_are_few_even_and_enclose(values):
    ticks = plots._ticks(values)
    steps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    assert 2 <= len(ticks) <= 8
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert ticks[0] <= min(values) + 1e-9 * abs(steps[0]) and ticks[-1] >= max(values) - 1e-9 * abs(steps[0])
    assert all(math.isfinite(tick) for tick in ticks)
