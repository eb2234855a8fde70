"""Activation and path patching, edits of attention, and scores of heads."""

from .attention_edits import AttentionEdit, edited_attention
from .attention_views import attention_views
from .engine import PatchedValues
from .faithfulness import Faithfulness, circuit_faithfulness
from .head_scores import (
    ComponentOutputs,
    attention_between,
    component_outputs,
    logit_attribution,
    pattern_scores,
)
from .patch_plan import PatchPlan
from .patching import Patching
from .report import result_heatmap, save_patch
from .results import PatchResult
from .weight_scores import composition_scores, copying_scores, duplicate_token_scores, previous_token_scores


__all__ = [
    "AttentionEdit",
    "ComponentOutputs",
    "Faithfulness",
    "PatchPlan",
    "PatchResult",
    "PatchedValues",
    "Patching",
    "attention_between",
    "attention_views",
    "circuit_faithfulness",
    "component_outputs",
    "composition_scores",
    "copying_scores",
    "duplicate_token_scores",
    "edited_attention",
    "logit_attribution",
    "pattern_scores",
    "previous_token_scores",
    "result_heatmap",
    "save_patch",
]
