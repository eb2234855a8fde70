"""From text to what a dictionary is trained on: documents, rows of tokens, batches of activations."""

import importlib


_EXPORTS = {
    "ActivationHarvester": "harvest",
    "ActivationStream": "activations",
    "ShardedStream": "activations",
    "bos_token_ids": "packing",
    "docstring_texts": "offline_text",
    "load_texts": "text",
    "pack_tokens": "packing",
}

__all__ = list(_EXPORTS)


def __getattr__(name):
    # Text can be loaded and packed without torch.
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
