"""The pictures of a card, as separate SVG files."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ...evaluation.evaluation_report import METRICS, format_number
from ...reports import plots
from ...text.markdown import Markdown, escape
from .card import ASSETS
from .facts import CardFacts


@dataclass
class Picture:
    """A chart: its file name, its title, and the content of the file."""

    name: str
    title: str
    svg: str

    @property
    def path(self) -> str:
        return f"{ASSETS}/{self.name}.svg"

    @property
    def markdown(self) -> Markdown:
        return Markdown(f"![{escape(self.title)}]({self.path})")


def result_pictures(facts: CardFacts) -> Iterator[Picture]:
    for number, report in enumerate(facts.reports, 1):
        ending = "" if len(facts.reports) == 1 else f"-{number}"
        # Many dictionaries of one sparsity are a pile of points, and many histograms hide each other.
        sparsities = {format_number(metrics.get("l0")) for metrics in report.metrics.values()}
        if len(report.dictionaries) > 1 and not (facts.many and len(sparsities) == 1):
            for metric, title in (("fvu", "Reconstruction error"), ("ce_recovered_zero", "Loss recovered")):
                svg = plots.sparsity_fidelity(report, metric, f"{title} over sparsity", METRICS[metric])
                if svg:
                    yield Picture(f"{metric}{ending}", f"{title} over active features per token", _standalone(svg))
        if not facts.many:
            yield Picture(f"density{ending}", "How often features fire", _standalone(plots.density_histogram(report)))


def training_pictures(facts: CardFacts) -> Iterator[Picture]:
    for metric, title in (
        ("fvu", "Reconstruction error in training"),
        ("dead_fraction", "Dead features in training"),
    ):
        svg = plots.loss_curves(facts.log, metric, title, METRICS[metric], names=list(facts.configs))
        if svg:
            yield Picture(f"training-{metric}", title, _standalone(svg))


def _standalone(svg: str) -> str:
    """A chart as a file with its own size, dark on white on any page."""
    opening, body = svg.split("\n", 1)
    _, _, width, height = re.search(r'viewBox="([^"]*)"', opening)[1].split()
    opening = opening.replace("<svg ", f'<svg width="{width}" height="{height}" color="#1f2328" ', 1)
    return f'{opening}\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n'
