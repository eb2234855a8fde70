"""Load text, pack it into rows of tokens, and harvest activations."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
