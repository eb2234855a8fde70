"""What configurations say of training and evaluation, as far as it is of the form in which this package writes it.

A configuration can come from anybody: numbers that are none, or that no measurement can give, are left out of a card.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ...evaluation.evaluation_report import METRICS


_SHARES = ("dead_fraction", "top1_agreement", "top1_agreement_zero_ablated", "top1_agreement_mean_ablated")
_NOT_NEGATIVE = ("l0", "l1", "mse", "normalized_mse", "fvu", "l2_ratio")
# Longer texts and larger numbers are no names and no measurements.
_LONGEST, _LARGEST = 1000, 1e15


def known_evaluation(evaluation: Any, num_features: int) -> dict[str, Any] | None:
    """
    An evaluation as [`EvaluationReport.of`] gives it; `None` where something in it is of another form.

    Args:
        evaluation (`Any`): What a configuration has as `evaluation`.
        num_features (`int`): Features of its dictionary.
    """
    if not isinstance(evaluation, Mapping):
        return None
    metrics, histogram, protocol = (evaluation.get(part) for part in ("metrics", "density_histogram", "protocol"))
    if not _are_metrics(metrics, num_features) or not _is_histogram(histogram, num_features):
        return None
    if not isinstance(protocol, Mapping) or not _PROTOCOL.keys() - protocol.keys() <= _LATER:
        return None
    known = {key: protocol[key] for key in _PROTOCOL if key in protocol}
    if not all(_PROTOCOL[key](value) for key, value in known.items()):
        return None
    return {"metrics": dict(metrics), "density_histogram": dict(histogram), "protocol": known}  # pyright: ignore[reportCallIssue]


def known_training(summary: Any) -> dict[str, Any]:
    """
    The entries of a training summary that are of the form in which the trainer writes them.

    Args:
        summary (`Any`): What a configuration has as `training_summary`.
    """
    if not isinstance(summary, Mapping):
        return {}
    return {key: summary[key] for key, fits in _SUMMARY.items() if summary.get(key) is not None and fits(summary[key])}


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that can be printed."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _are_metrics(metrics: Any, num_features: int) -> bool:
    if not isinstance(metrics, Mapping) or not metrics.keys() <= METRICS.keys():
        return False
    known = {name: value for name, value in metrics.items() if value is not None}
    return (
        all(is_number(value) for value in known.values())
        and all(0 <= known[name] <= 1 for name in _SHARES if name in known)
        and all(known[name] >= 0 for name in _NOT_NEGATIVE if name in known)
        and known.get("l0", 0) <= num_features
    )


def _is_histogram(histogram: Any, num_features: int) -> bool:
    if not isinstance(histogram, Mapping):
        return False
    edges, counts = histogram.get("log10_edges"), histogram.get("counts")
    if not isinstance(edges, list | tuple) or not isinstance(counts, list | tuple) or len(edges) != len(counts) + 1:
        return False
    return (
        len(edges) > 1
        and all(is_number(edge) and abs(edge) <= 100 for edge in edges)
        and all(low < high for low, high in zip(edges, edges[1:], strict=False))
        and all(map(_is_count, [*counts, histogram.get("never_fired")]))
        and sum(counts) + histogram["never_fired"] <= num_features
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST


def _is_text_or_none(value: Any) -> bool:
    return value is None or _is_text(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_versions(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) <= 100
        and all(_is_text(part) for entry in value.items() for part in entry)
    )


def _are_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_count, value))


_PROTOCOL: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("base_model", "base_model_revision", "dataset", "dataset_id", "dataset_split"), _is_text_or_none),
    **dict.fromkeys(
        ("fidelity_tokens", "loss_tokens", "sequence_length", "shortest_sequence", "skip_first"), _is_count
    ),
    **dict.fromkeys(("dtype", "device", "ablation"), _is_text),
    "begins_with_bos": _is_flag,
    "special_token_ids": _are_ids,
    "versions": _are_versions,
}

# Entries that evaluations of earlier versions do not have.
_LATER = {"dataset_id", "shortest_sequence"}

_SUMMARY: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        (
            "tokens",
            "steps",
            "batch_tokens",
            "context_length",
            "dataset_rows",
            "warmup_steps",
            "dead_after_tokens",
            "buffer_tokens",
            "processes",
            "skip_first",
            "seed",
        ),
        _is_count,
    ),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "max_grad_norm", "sparsity_warmup", "outlier_factor"), is_number
    ),
    **dict.fromkeys(
        ("dataset", "dataset_id", "lr_scheduler", "optimizer", "device", "precision", "base_model_dtype"), _is_text
    ),
    "versions": _are_versions,
}
