"""Pages and pictures of a run."""

from .page import render_report, write_report


__all__ = ["render_report", "write_report"]
