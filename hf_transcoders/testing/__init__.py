"""Helpers for tests of this package and of packages built on it: a local Hub server."""

from .local_hub import LocalHub, local_hub


__all__ = ["LocalHub", "local_hub"]
