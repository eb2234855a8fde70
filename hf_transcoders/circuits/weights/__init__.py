"""Views of features from weights alone: connections, de-embeddings, logits and pull-backs; and mean contributions."""

from .connections import TopConnections
from .feature_weights import FeatureWeights
from .mean_contributions import MeanContributions, SourceContributions
from .ov_circuits import OVCircuits
from .token_effects import TokenScores


__all__ = [
    "FeatureWeights",
    "MeanContributions",
    "OVCircuits",
    "SourceContributions",
    "TokenScores",
    "TopConnections",
]
