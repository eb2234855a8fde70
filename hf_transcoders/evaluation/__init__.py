"""Evaluate dictionaries inside a language model, and measure drift.

Names are imported on first use: `metrics` needs the `evaluate` library, the others do not.
"""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
