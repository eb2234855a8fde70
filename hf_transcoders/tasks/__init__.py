"""Tasks: pairs of clean and corrupted prompts with answers and named positions, and their metrics."""

import lazy_loader


# Name on the command line -> the function that makes the task.
TASKS = {
    "ioi": "indirect_object_identification",
    "colored-objects": "colored_objects",
    "greater-than": "greater_than",
    "gendered-pronoun": "gendered_pronoun",
    "subject-verb-agreement": "subject_verb_agreement",
    "docstring": "docstring_completion",
}

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["TASKS"]
