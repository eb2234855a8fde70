"""Describe features: the text they activate on and the tokens they promote."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
