"""The page of an attribution graph."""

from .graph_page import render_graph, write_graph


__all__ = [
    "render_graph",
    "write_graph",
]
