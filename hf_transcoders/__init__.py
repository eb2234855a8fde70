"""Transcoders for Hugging Face language models: train, evaluate, save, share and read them.

With the package imported, `AutoConfig` and `AutoModel` know the model type "transcoder". Every public name is imported on
first use, and so are PyTorch and transformers.
"""

import lazy_loader

from .models.auto_classes import register_with_auto_classes


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_with_auto_classes()
