"""What tests of this package, and of packages built on it, need: a server that answers as the Hub does."""

from .local_hub import LocalHub, local_hub


__all__ = ["LocalHub", "local_hub"]
