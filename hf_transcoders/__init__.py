"""Transcoders for Hugging Face language models: train, evaluate, save, share and read them.

Importing the package registers [`TranscoderConfig`] and [`TranscoderModel`] with the Auto classes; every other public
name is imported on first use.
"""

import lazy_loader

# AutoConfig and AutoModel know model type "transcoder" only once these two classes exist.
from . import models as models


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
