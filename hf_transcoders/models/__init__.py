"""Sparse dictionaries: configuration, model, sets of several dictionaries, and cross-layer transcoders."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
