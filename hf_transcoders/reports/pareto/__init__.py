"""Pareto fronts of sparsity against fidelity: found, put into words, drawn and written."""

from .fronts import MeasuredDictionary, ParetoFronts, measured_in, pareto_front, pareto_fronts, protocol_differences
from .pareto_page import write_pareto_page
from .png import write_pareto_png
from .fronts_csv import save_pareto_csv
from .caveats import heading, warning
from .write import write_pareto
