"""Metrics of dictionaries, the evaluator that measures them inside a language model, and what features respond to.

Names are imported on first use: `metrics` needs the `evaluate` library, the others do not.
"""

import importlib


_EXPORTS = {
    "ReconstructionStatistics": "statistics",
    "FeatureStatistics": "statistics",
    "LossStatistics": "statistics",
    "NextTokenComparison": "statistics",
    "ce_recovered": "statistics",
    "density_histogram": "statistics",
    "as_batch": "metrics",
    "L0": "metrics",
    "FVU": "metrics",
    "ExplainedVariance": "metrics",
    "DeadFeatures": "metrics",
    "FeatureDensity": "metrics",
    "LossRecovered": "metrics",
    "KL": "metrics",
    "TranscoderEvaluator": "evaluator",
    "EvaluationReport": "evaluator",
    "DriftProbe": "drift",
    "DriftReport": "drift",
    "FeatureChange": "drift",
    "measure_drift": "drift",
    "explain_dictionaries": "features",
    "explain_features": "features",
    "FeatureExplanation": "features",
    "FeatureContext": "features",
}

__all__ = list(_EXPORTS)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
