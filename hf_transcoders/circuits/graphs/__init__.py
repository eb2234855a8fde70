"""Attribution graphs: direct effects of features, errors and tokens on the predictions of a model."""

from .attribution import attribution_graph
from .combine import contrast, union
from .edge_validation import EdgeValidation
from .graph import AttributionGraph
from .head_loadings import HeadLoadings, head_loadings
from .nodes import KINDS, Node, TargetInfo
from .page_data import write_graph_page
from .qk import QKAttribution, qk_attribution
from .targets import Target
from .validation import validate_edges
from .verdicts import Verdict, graph_verdicts


__all__ = [
    "AttributionGraph",
    "EdgeValidation",
    "HeadLoadings",
    "KINDS",
    "Node",
    "QKAttribution",
    "Target",
    "TargetInfo",
    "Verdict",
    "attribution_graph",
    "contrast",
    "graph_verdicts",
    "head_loadings",
    "qk_attribution",
    "union",
    "validate_edges",
    "write_graph_page",
]
