"""Tasks for circuits: pairs of prompts with answers and named positions, and what they are measured by."""

import importlib


_EXPORTS = {
    "Task": "task",
    "TokenBatch": "task",
    "AnswerBatch": "task",
    "indirect_object_identification": "ioi",
    "colored_objects": "colours",
    "greater_than": "years",
    "gendered_pronoun": "pronouns",
    "subject_verb_agreement": "agreement",
    "docstring_completion": "docstrings",
    "from_eap_csv": "imports",
    "from_auto_circuit_json": "imports",
    "from_pairs_json": "imports",
    "from_mib": "imports",
    "Estimate": "metrics",
    "logit_difference": "metrics",
    "probability_difference": "metrics",
    "kl_divergence": "metrics",
    "accuracy": "metrics",
    "rank": "metrics",
    "wilson_interval": "metrics",
    "bootstrap_interval": "metrics",
    "estimate": "metrics",
    "row_metrics": "measuring",
    "end_logits": "measuring",
    "measure": "measuring",
}

# What the command line calls them -> the function that makes them.
TASKS = {
    "ioi": "indirect_object_identification",
    "colored-objects": "colored_objects",
    "greater-than": "greater_than",
    "gendered-pronoun": "gendered_pronoun",
    "subject-verb-agreement": "subject_verb_agreement",
    "docstring": "docstring_completion",
}

__all__ = ["TASKS", *_EXPORTS]


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
