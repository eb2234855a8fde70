"""The `hf-transcoders` command: parses, calls the library, prints."""

from .main import main


__all__ = [
    "main",
]
