"""The page of an attribution graph."""

from .page import render_graph, write_graph
