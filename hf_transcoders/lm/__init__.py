"""Read, replace and ablate activations of the base language model."""

from .architectures import Architecture, architecture_of, locate, num_layers, register_architecture, site_width
from .attention import AttentionCall, edit_attention
from .capture import capture
from .freeze import FrozenRun, frozen, record_frozen
from .offline_models import load_language_model, offline_model
from .replace import ablate, replace, splice
from .sites import Site


__all__ = [
    "Architecture",
    "AttentionCall",
    "FrozenRun",
    "Site",
    "ablate",
    "architecture_of",
    "capture",
    "edit_attention",
    "frozen",
    "load_language_model",
    "locate",
    "num_layers",
    "offline_model",
    "record_frozen",
    "register_architecture",
    "replace",
    "site_width",
    "splice",
]
