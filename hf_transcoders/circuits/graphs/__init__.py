"""Attribution graphs: what made a model say what it says, through features, errors and tokens."""

from .attribution import attribution_graph, attribution_graphs
from .combine import contrast, union
from .graph import KINDS, AttributionGraph, Node, TargetInfo
from .head_loadings import HeadLoadings, head_loadings
from .qk import QKAttribution, qk_attribution
from .targets import Target
from .validation import Certificate, certificate


__all__ = [
    "AttributionGraph",
    "Certificate",
    "HeadLoadings",
    "KINDS",
    "Node",
    "QKAttribution",
    "Target",
    "TargetInfo",
    "attribution_graph",
    "attribution_graphs",
    "certificate",
    "contrast",
    "head_loadings",
    "qk_attribution",
    "union",
]
