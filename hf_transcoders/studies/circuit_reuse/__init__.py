"""Circuit reuse: do two tasks use the same heads, and can what one task shows repair the other?"""

from ...circuits.patching.attention_views import attention_views
from ...circuits.patching.faithfulness import Faithfulness, circuit_faithfulness
from .end_runs import Predictions, predict_at_end
from .movers import MoverChange, mover_change
from .overlap import Overlap, overlaps
from .published_heads import GPT2_MEDIUM, Published, published_for
from .repair import Outcome, forced, repair_outcomes
from .reuse_report import save_patch, save_reuse, summary
from .roles import Roles, RoleTests, assign_roles, find_roles
from .stages import Stage, trace_stages
from .study import CircuitReuse, Repair, circuit_of, reuse_circuit


__all__ = [
    "CircuitReuse",
    "Faithfulness",
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
    "attention_views",
    "circuit_faithfulness",
    "circuit_of",
    "find_roles",
    "forced",
    "mover_change",
    "overlaps",
    "predict_at_end",
    "published_for",
    "repair_outcomes",
    "reuse_circuit",
    "save_patch",
    "save_reuse",
    "summary",
    "trace_stages",
]
