"""Attribution graphs: what made a model say what it says, through features, errors and tokens."""

from .graph import KINDS, AttributionGraph, Node, TargetInfo
