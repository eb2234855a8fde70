"""Jinja environment of all pages."""

import functools
from collections.abc import Iterable

from ..evaluation.evaluation_report import format_number
from ..text.visible import visible
from .heatmap_svg import attention_svg, heatmap_svg
from .sections import cell_text, fact_text


@functools.cache
def page_templates():
    """Return the `jinja2.Environment` of all pages."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    # Autoescape covers texts from models, data sets and file names; SVG functions escape their own texts.
    environment = Environment(
        loader=PackageLoader("hf_transcoders.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Tokens of running text.
    environment.filters["token"] = lambda token: visible(token, in_text=True)
    environment.filters["number"] = format_number
    environment.filters["cell"] = cell_text
    environment.filters["fact"] = fact_text
    environment.filters["curves"] = lambda chart: Markup(chart.svg())
    environment.filters["map"] = lambda heatmap: Markup(heatmap_svg(heatmap))
    environment.filters["matrix"] = lambda view: Markup(attention_svg(view))
    return environment


def present(svgs: Iterable[str | None]) -> list:
    """Return the charts that are not `None` as markup, which templates do not escape again."""
    from markupsafe import Markup

    return [Markup(svg) for svg in svgs if svg is not None]
