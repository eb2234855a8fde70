"""HTML pages and PNG pictures of runs, studies and Pareto fronts."""

from .page import render_report, write_report
from .pareto.fronts import MeasuredDictionary, ParetoFronts, measured_in, pareto_front, pareto_fronts
from .pareto.fronts_csv import save_pareto_csv
from .pareto.pareto_page import write_pareto_page
from .pareto.png import write_pareto_png
from .pareto.write import write_pareto


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
