"""The `hf-transcoders` command, which parses arguments, calls the library and prints results."""

from .main import main


__all__ = [
    "main",
]
