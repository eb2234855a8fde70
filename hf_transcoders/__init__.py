"""Transcoders for Hugging Face language models: train, evaluate, save, share and read them.

Importing the package registers [`TranscoderConfig`] and [`TranscoderModel`] with the Auto classes; every other public
name is imported on first use.
"""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0"

# Public name -> the module that defines it. The one list of what the package offers.
_EXPORTS = {
    "TranscoderError": "errors",
    "TranscoderConfig": "models",
    "TranscoderModel": "models",
    "TranscoderOutput": "models",
    "TranscoderSet": "models",
    "Site": "lm",
    "register_architecture": "lm",
    "capture": "lm",
    "replace": "lm",
    "ablate": "lm",
    "splice": "lm",
    "edit_attention": "lm",
    "offline_model": "lm",
    "load_texts": "data",
    "pack_tokens": "data",
    "ActivationStream": "data",
    "TranscoderTrainer": "training",
    "TranscoderTrainingArguments": "training",
    "TranscoderEvaluator": "evaluation",
    "EvaluationReport": "evaluation",
    "explain_features": "evaluation",
    "DriftProbe": "evaluation",
    "DriftReport": "evaluation",
    "measure_drift": "evaluation",
    "write_report": "reports",
    "TranscoderTrackingCallback": "tracking",
    "TranscoderProbeCallback": "tracking",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .data import ActivationStream, load_texts, pack_tokens
    from .errors import TranscoderError
    from .evaluation import (
        DriftProbe,
        DriftReport,
        EvaluationReport,
        TranscoderEvaluator,
        explain_features,
        measure_drift,
    )
    from .lm import Site, ablate, capture, edit_attention, offline_model, register_architecture, replace, splice
    from .models import TranscoderConfig, TranscoderModel, TranscoderOutput, TranscoderSet
    from .reports import write_report
    from .tracking import TranscoderProbeCallback, TranscoderTrackingCallback
    from .training import TranscoderTrainer, TranscoderTrainingArguments


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)


# AutoConfig and AutoModel know model type "transcoder" only once these two classes exist.
importlib.import_module(".models", __name__)
