"""Circuit reuse: do two tasks use the same heads, and can the circuit of one task repair the other?"""

from .end_runs import Predictions, predict_at_end
from .movers import MoverChange, mover_change
from .overlap import Overlap, overlaps
from .published_heads import GPT2_MEDIUM, Published, published_for
from .repair import Outcome, forced, repair_outcomes
from .reuse_report import save_reuse
from .reuse_results import CircuitReuse, Repair
from .roles import Roles, RoleTests, assign_roles, find_roles
from .stages import Stage, trace_stages
from .study import circuit_of, reuse_circuit


__all__ = [
    "CircuitReuse",
    "GPT2_MEDIUM",
    "MoverChange",
    "Outcome",
    "Overlap",
    "Predictions",
    "Published",
    "Repair",
    "RoleTests",
    "Roles",
    "Stage",
    "assign_roles",
    "circuit_of",
    "find_roles",
    "forced",
    "mover_change",
    "overlaps",
    "predict_at_end",
    "published_for",
    "repair_outcomes",
    "reuse_circuit",
    "save_reuse",
    "trace_stages",
]
