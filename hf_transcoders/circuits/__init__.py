"""Circuits: what makes a model do what it does, found by patching, by taking it apart and by changing features."""

from .graphs import (
    AttributionGraph,
    Target,
    attribution_graph,
    attribution_graphs,
    validation as certificate,
    contrast,
    union,
)
from .interventions import FeatureEdit, InterventionEffect, intervene, intervention_losses, measure_effect
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
from .paths import GreedyPaths, Path, PathFilter, PathGraph, greedy_paths, select_paths
from .weights import FeatureWeights, MeanContributions, TokenScores, TopConnections
