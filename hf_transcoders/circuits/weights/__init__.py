"""What the weights alone say about features: connections, de-embeddings, logits, pull-backs, and contributions beside them."""

from .connections import TopConnections
from .mean_contributions import MeanContributions, SourceContributions
from .feature_weights import FeatureWeights
from .ov_circuits import OVCircuits
from .token_effects import TokenScores
