"""Patching: activations and paths of many changed runs at once, edits of attention, and scores of heads."""

from .attention_edits import AttentionEdit, edited_attention
from .engine import PatchedValues, PatchEngine
from .head_scores import (
    ComponentOutputs,
    attention_between,
    component_outputs,
    logit_attribution,
    pattern_scores,
)
from .patch import patch_attention, patch_heads, patch_mlps, patch_residual
from .patch_plan import PatchPlan
from .path_patching import path_patch
from .results import PatchResult
from .weight_scores import composition_scores, copying_scores, duplicate_token_scores, previous_token_scores


__all__ = [
    "AttentionEdit",
    "ComponentOutputs",
    "PatchEngine",
    "PatchPlan",
    "PatchResult",
    "PatchedValues",
    "attention_between",
    "component_outputs",
    "composition_scores",
    "copying_scores",
    "duplicate_token_scores",
    "edited_attention",
    "logit_attribution",
    "patch_attention",
    "patch_heads",
    "patch_mlps",
    "patch_residual",
    "path_patch",
    "pattern_scores",
    "previous_token_scores",
]
