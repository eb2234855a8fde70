"""What the weights alone say about features: connections, de-embeddings, logits, pull-backs, and contributions beside them."""

from .connections import TopConnections
from .contributions import MeanContributions, SourceContributions
from .feature_weights import FeatureWeights
from .heads import OVCircuits
from .tokens import TokenScores
