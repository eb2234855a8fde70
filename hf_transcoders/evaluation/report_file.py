"""Check evaluations that are read from files, so that they can be printed and plotted."""

from collections.abc import Mapping
from typing import Any

from ..errors import TranscoderError
from ..text.checked import checked, entries, entry, only
from ..text.printable import printable


# Metrics of every dictionary in pages and tables; reports of earlier versions may lack others.
_REQUIRED = ("l0", "fvu", "explained_variance", "ce_recovered_zero", "dead_fraction")
_REQUIRED_TOGETHER = ("ce_original", "ce_spliced", "ce_recovered_zero", "kl", "top1_agreement")
_NOT_NEGATIVE = ("l0", "l1", "mse", "normalized_mse", "fvu", "l2_ratio")
_SHARES = ("dead_fraction", "top1_agreement", "top1_agreement_zero_ablated", "top1_agreement_mean_ablated")
# Limits on texts that are shown.
_LONGEST_TEXT, _MOST_TEXTS = 1000, 200


def check_report(content: dict[str, Any], source: str, together_name: str) -> None:
    """Refuse a report that cannot be shown.

    Args:
        content (`dict`): Content of the file.
        source (`str`): Path of the file, for messages.
        together_name (`str`): Name for the whole set, which no dictionary can have.

    Raises:
        [`TranscoderError`]: an entry is missing, of the wrong kind, out of range, or inconsistent with the others.
    """
    only(content, ("dictionaries", "protocol", "together"), source)
    dictionaries = entry(content, "dictionaries", dict, source)
    if not dictionaries:
        raise TranscoderError(f"{printable(source)} has no dictionary: evaluate at least one.")
    for name in dictionaries:
        _check_dictionary(entry(dictionaries, name, dict, source), f"the entry '{name}' of {source}")
    if len({str(each["density_histogram"]["log10_edges"]) for each in dictionaries.values()}) > 1:
        raise TranscoderError(f"{printable(source)} has density histograms of different bins: evaluate again.")
    check_protocol(entry(content, "protocol", dict, source), f"the protocol of {source}")
    together = checked(content.get("together"), dict, f"'together' in {source}", null=True)
    if together is not None:
        _check_metrics(together, _REQUIRED_TOGETHER, f"'together' in {source}")
        if together_name in dictionaries:
            raise TranscoderError(f"{printable(source)} has a dictionary with the name '{together_name}': rename it.")


def _check_dictionary(measured, source):
    only(measured, ("metrics", "density_histogram", "config"), source)
    config = entry(measured, "config", dict, source)
    for name in ("input_site", "output_site"):
        entry(config, name, str, source, null=True)
    entry(config, "num_features", int, source, low=1)
    for name, kind in (("activation", str), ("k", int)):
        checked(config.get(name), kind, f"'{name}' in {source}", null=True)
    _check_numbers(measured, None, source, _REQUIRED)


def check_evaluation(evaluation: Mapping[str, Any], num_features: int, source: str) -> None:
    """Refuse the evaluation in the configuration of a dictionary if it cannot be shown.

    Args:
        evaluation (`Mapping[str, Any]`): Evaluation, as [`EvaluationReport.of`] returns it.
        num_features (`int`): Number of features of the dictionary.
        source (`str`): Name of the evaluation, for messages.

    Raises:
        [`TranscoderError`]: an entry is missing, of the wrong kind or out of its range.
    """
    _check_numbers(evaluation, num_features, source)
    check_protocol(entry(evaluation, "protocol", dict, source), f"the protocol of {source}")


def _check_numbers(measured, num_features, source, required=()):
    _check_metrics(entry(measured, "metrics", dict, source), required, source, num_features)
    histogram = entry(measured, "density_histogram", dict, source)
    # Logarithms of shares; larger values cannot be plotted.
    edges = entries(histogram, "log10_edges", float, source, low=-100, high=100)
    counts = entries(histogram, "counts", int, source, low=0)
    never_fired = entry(histogram, "never_fired", int, source, low=0)
    in_order = all(low < high for low, high in zip(edges, edges[1:], strict=False))
    too_many = num_features is not None and sum(counts) + never_fired > num_features
    if not in_order or not len(edges) == len(counts) + 1 > 1 or too_many:
        raise TranscoderError(f"{printable(source)} has a density histogram that is not one: evaluate again.")


def _check_metrics(metrics, required, source, num_features=None):
    highest = {"l0": num_features, **dict.fromkeys(_SHARES, 1)}
    for name in (*required, *metrics):
        low = 0 if name in _NOT_NEGATIVE or name in _SHARES else None
        entry(metrics, name, float, source, null=True, low=low, high=highest.get(name))


def check_protocol(protocol: dict[str, Any], source: str, ablation: bool = True) -> None:
    """Refuse an incomplete protocol, or entries of the wrong kind.

    Args:
        protocol (`dict`): Protocol of an [`EvaluationReport`].
        source (`str`): Path of the file, for messages.
        ablation (`bool`, *optional*, defaults to `True`): Whether the protocol must describe ablations.

    Raises:
        [`TranscoderError`]: an entry is missing or of the wrong kind.
    """
    for name in ("base_model", "base_model_revision", "dataset", "dataset_split"):
        entry(protocol, name, str, source, null=True)
    for name, low in (("fidelity_tokens", 0), ("loss_tokens", 0), ("sequence_length", 1), ("skip_first", 0)):
        entry(protocol, name, int, source, low=low)
    for name in ("dtype", "device", *(["ablation"] if ablation else [])):
        entry(protocol, name, str, source)
    entry(protocol, "begins_with_bos", bool, source)
    entries(protocol, "special_token_ids", int, source, low=0)
    check_versions(entry(protocol, "versions", dict, source), source)
    checked(protocol.get("dataset_id"), str, f"'dataset_id' in {source}", null=True)
    checked(protocol.get("shortest_sequence"), int, f"'shortest_sequence' in {source}", null=True, low=1)
    check_lengths(list(protocol.values()), source)


def check_versions(versions: Mapping[str, Any], source: str) -> None:
    """Refuse versions of packages that are not texts."""
    for name in versions:
        entry(versions, name, str, source)
    check_lengths([*versions, *versions.values()], source)


def check_lengths(texts: list[Any], source: str) -> None:
    """Refuse texts that are too long, or too many, to be shown."""
    if len(texts) > _MOST_TEXTS or any(isinstance(text, str) and len(text) > _LONGEST_TEXT for text in texts):
        raise TranscoderError(f"{printable(source)[:200]} has too long a text or too many of them: evaluate again.")
