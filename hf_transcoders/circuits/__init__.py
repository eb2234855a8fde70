"""Circuits: which parts of a model do a task, found by patching."""

from .patching import (
    AttentionEdit,
    PatchEngine,
    PatchPlan,
    PatchResult,
    attention_between,
    component_outputs,
    composition_scores,
    copying_scores,
    duplicate_token_scores,
    edited_attention,
    logit_attribution,
    patch_attention,
    patch_heads,
    patch_mlps,
    patch_residual,
    path_patch,
    pattern_scores,
    previous_token_scores,
)
