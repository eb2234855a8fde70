"""Explain features by rules or by a language model, and score the explanations on text of other documents."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
