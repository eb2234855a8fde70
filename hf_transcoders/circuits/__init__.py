"""Circuits: which parts of a model do a task, found by patching and by changing features."""

from .interventions import FeatureEdit, InterventionEffect, intervene, intervention_losses, measure_effect
from .patching import (
    AttentionEdit,
    PatchEngine,
    PatchPlan,
    PatchResult,
    attention_between,
    component_outputs,
    copying_scores,
    edited_attention,
    logit_attribution,
    patch_attention,
    patch_heads,
    patch_mlps,
    patch_residual,
    path_patch,
    pattern_scores,
)
