"""Training summaries of configurations, reduced to entries that a card can show: a configuration can come from anybody."""

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import TranscoderError
from ...evaluation.report_file import check_lengths, check_versions
from ...text.checked import checked


def known_training(summary: Any) -> dict[str, Any]:
    """
    The entries of a training summary that have the form in which the trainer writes them.

    Args:
        summary (`Any`): The `training_summary` of a configuration.
    """
    if not isinstance(summary, Mapping):
        return {}
    return {key: summary[key] for key, check in _SUMMARY.items() if key in summary and _passes(check, summary[key])}


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that can be printed."""
    return _passes(_check_number, value)


def _passes(check: Callable[[Any], object], value: Any) -> bool:
    try:
        check(value)
    except TranscoderError:
        return False
    return True


def _check_count(value):
    checked(value, int, "A count", low=0)


def _check_number(value):
    checked(value, float, "A number")


def _check_text(value):
    check_lengths([checked(value, str, "A text")], "A text")


def _check_versions(value):
    check_versions(checked(value, dict, "The versions"), "the versions")


_COUNTS = (
    "tokens", "steps", "batch_tokens", "context_length", "dataset_rows", "warmup_steps", "dead_after_tokens",
    "buffer_tokens", "processes", "skip_first", "seed",
)  # fmt: skip
_SUMMARY: dict[str, Callable[[Any], object]] = {
    **dict.fromkeys(_COUNTS, _check_count),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "max_grad_norm", "sparsity_warmup", "outlier_factor"), _check_number
    ),
    **dict.fromkeys(
        ("dataset", "dataset_id", "lr_scheduler", "optimizer", "device", "precision", "base_model_dtype"), _check_text
    ),
    "versions": _check_versions,
}
