"""Circuit reuse: do two tasks use the same heads, and can what one task shows repair the other?"""

from .end_runs import Predictions, predict_at_end
from ...circuits.patching.faithfulness import Faithfulness, circuit_faithfulness
from .movers import MoverChange, mover_change
from .overlap import Overlap, overlaps
from .published_heads import GPT2_MEDIUM, Published, published_for
from .repair import Outcome, forced, repair_outcomes
from .reuse_report import save_patch, save_reuse, summary
from .study import CircuitReuse, Repair, circuit_of, reuse_circuit
from .roles import Roles, RoleTests, assign_roles, find_roles
from .stages import Stage, trace_stages
from ...circuits.patching.attention_views import attention_views
