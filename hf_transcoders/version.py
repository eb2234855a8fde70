"""The versions of this package and of the libraries that affect its results."""

import platform


__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of the packages that numbers come from, and of Python."""
    import torch
    import transformers

    return {
        "hf_transcoders": __version__,
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
