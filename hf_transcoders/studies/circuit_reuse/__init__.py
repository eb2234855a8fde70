"""Circuit reuse: do two tasks use the same heads, and which heads repair a task when their attention is forced?"""

from .downstream import DownstreamChange, downstream_change
from .end_runs import Predictions, predict_at_end
from .forced_heads import ForcedAttention, ForcedHead, token_sets
from .found_repair import RepairStudy, find_repair
from .head_evidence import HeadEvidence, StageEffect, head_evidence
from .judged_repairs import forced_predictions
from .movers import MoverChange, mover_change
from .overlap import Overlap, overlaps
from .published_heads import GPT2_MEDIUM, Published, published_for
from .repair import Outcome, forced, repair_outcomes
from .repair_report import save_repair
from .repair_search import FoundRepair, RepairSearch, SearchStep, search_repair
from .reuse_report import save_reuse
from .reuse_results import CircuitReuse, Repair
from .roles import Roles, RoleTests, assign_roles, find_roles
from .stages import Stage, trace_stages
from .study import circuit_of, reuse_circuit
from .traced_tasks import TracedTasks, trace_tasks


__all__ = [
    "CircuitReuse",
    "DownstreamChange",
    "ForcedAttention",
    "ForcedHead",
    "FoundRepair",
    "GPT2_MEDIUM",
    "HeadEvidence",
    "MoverChange",
    "Outcome",
    "Overlap",
    "Predictions",
    "Published",
    "Repair",
    "RepairSearch",
    "RepairStudy",
    "RoleTests",
    "Roles",
    "SearchStep",
    "Stage",
    "StageEffect",
    "TracedTasks",
    "assign_roles",
    "circuit_of",
    "downstream_change",
    "find_repair",
    "find_roles",
    "forced",
    "forced_predictions",
    "head_evidence",
    "mover_change",
    "overlaps",
    "predict_at_end",
    "published_for",
    "repair_outcomes",
    "reuse_circuit",
    "save_repair",
    "save_reuse",
    "search_repair",
    "token_sets",
    "trace_stages",
    "trace_tasks",
]
