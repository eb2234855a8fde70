"""Computational paths: contributions to a target, step by step through features, heads and tokens."""

from .filters import PathFilter, select_paths
from .path_graph import PathGraph, PathNode, merge_paths
from .search import GreedyPaths, greedy_paths
from .steps import Path, Step


__all__ = [
    "GreedyPaths",
    "Path",
    "PathFilter",
    "PathGraph",
    "PathNode",
    "Step",
    "greedy_paths",
    "merge_paths",
    "select_paths",
]
