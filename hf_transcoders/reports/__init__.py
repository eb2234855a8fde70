"""HTML pages and PNG pictures of runs, studies and Pareto fronts."""

from .page import render_report, write_report
from .pareto import (
    MeasuredDictionary,
    ParetoFronts,
    measured_in,
    pareto_front,
    pareto_fronts,
    save_pareto_csv,
    write_pareto,
    write_pareto_page,
    write_pareto_png,
)


__all__ = [
    "MeasuredDictionary",
    "ParetoFronts",
    "measured_in",
    "pareto_front",
    "pareto_fronts",
    "render_report",
    "save_pareto_csv",
    "write_pareto",
    "write_pareto_page",
    "write_pareto_png",
    "write_report",
]
