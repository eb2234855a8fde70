"""Circuits: what makes a model do what it does, found by patching, by taking it apart and by changing features."""

from .graphs import (
    AttributionGraph,
    Target,
    attribution_graph,
    attribution_graphs,
    certificate,
    contrast,
    union,
)
from .interventions import FeatureEdit, InterventionEffect, intervene, intervention_losses, measure_effect
from .patching import (
    AttentionEdit,
    Patching,
    PatchPlan,
    PatchResult,
    attention_between,
    component_outputs,
    composition_scores,
    copying_scores,
    duplicate_token_scores,
    edited_attention,
    logit_attribution,
    pattern_scores,
    previous_token_scores,
)
from .paths import GreedyPaths, Path, PathFilter, PathGraph, greedy_paths, select_paths
from .weights import FeatureWeights, MeanContributions, TokenScores, TopConnections


__all__ = [
    "AttentionEdit",
    "AttributionGraph",
    "FeatureEdit",
    "FeatureWeights",
    "GreedyPaths",
    "InterventionEffect",
    "MeanContributions",
    "PatchPlan",
    "PatchResult",
    "Patching",
    "Path",
    "PathFilter",
    "PathGraph",
    "Target",
    "TokenScores",
    "TopConnections",
    "attention_between",
    "attribution_graph",
    "attribution_graphs",
    "certificate",
    "component_outputs",
    "composition_scores",
    "contrast",
    "copying_scores",
    "duplicate_token_scores",
    "edited_attention",
    "greedy_paths",
    "intervene",
    "intervention_losses",
    "logit_attribution",
    "measure_effect",
    "pattern_scores",
    "previous_token_scores",
    "select_paths",
    "union",
]
