"""Pareto fronts of sparsity and fidelity: compute, describe, draw and save them."""

from .caveats import heading, warning
from .fronts import MeasuredDictionary, ParetoFronts, measured_in, pareto_front, pareto_fronts, protocol_differences
from .fronts_csv import save_pareto_csv
from .pareto_page import write_pareto_page
from .png import write_pareto_png
from .write import write_pareto


__all__ = [
    "MeasuredDictionary",
    "ParetoFronts",
    "heading",
    "measured_in",
    "pareto_front",
    "pareto_fronts",
    "protocol_differences",
    "save_pareto_csv",
    "warning",
    "write_pareto",
    "write_pareto_page",
    "write_pareto_png",
]
