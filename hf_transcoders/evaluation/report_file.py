"""Evaluation reports as they stand in files, checked so that what loads can be printed and drawn."""

from typing import Any

from ..errors import TranscoderError
from ..text.checked import checked, entries, entry, only
from ..text.printable import printable


# What pages and tables show of every dictionary; a report of an earlier version may lack others.
_REQUIRED = ("l0", "fvu", "explained_variance", "ce_recovered_zero", "dead_fraction")
_REQUIRED_TOGETHER = ("ce_original", "ce_spliced", "ce_recovered_zero", "kl", "top1_agreement")
_NOT_NEGATIVE = ("l0", "l1", "mse", "normalized_mse", "fvu", "l2_ratio", "dead_fraction", "top1_agreement")


def check_report(content: dict[str, Any], source: str, together_name: str) -> None:
    """Refuse a report that cannot be shown.

    Args:
        content (`dict`): What the file holds.
        source (`str`): The file.
        together_name (`str`): The name under which a set as a whole is listed, which no dictionary can have then.

    Raises:
        [`TranscoderError`]: an entry is missing, of the wrong kind, out of its range, or does not fit the others.
    """
    only(content, ("dictionaries", "protocol", "together"), source)
    dictionaries = entry(content, "dictionaries", dict, source)
    if not dictionaries:
        raise TranscoderError(f"{printable(source)} is of no dictionary: evaluate at least one.")
    for name in dictionaries:
        _check_dictionary(entry(dictionaries, name, dict, source), f"the entry '{name}' of {source}")
    if len({str(each["density_histogram"]["log10_edges"]) for each in dictionaries.values()}) > 1:
        raise TranscoderError(f"{printable(source)} has density histograms of different bins: evaluate again.")
    check_protocol(entry(content, "protocol", dict, source), f"the protocol of {source}")
    together = checked(content.get("together"), dict, f"'together' in {source}", null=True)
    if together is not None:
        _check_metrics(together, _REQUIRED_TOGETHER, f"'together' in {source}")
        if together_name in dictionaries:
            raise TranscoderError(f"{printable(source)} has a dictionary of the name '{together_name}': rename it.")


def _check_dictionary(measured, source):
    only(measured, ("metrics", "density_histogram", "config"), source)
    _check_metrics(entry(measured, "metrics", dict, source), _REQUIRED, source)
    histogram = entry(measured, "density_histogram", dict, source)
    # Logarithms of shares: wider ones would be axes without end.
    edges = entries(histogram, "log10_edges", float, source, low=-100, high=100)
    counts = entries(histogram, "counts", int, source, low=0)
    entry(histogram, "never_fired", int, source, low=0)
    if len(edges) < 2 or len(counts) != len(edges) - 1 or any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
        raise TranscoderError(f"{printable(source)} has a density histogram that is none: evaluate again.")
    config = entry(measured, "config", dict, source)
    for name in ("input_site", "output_site"):
        entry(config, name, str, source, null=True)
    entry(config, "num_features", int, source, low=1)
    for name, kind in (("activation", str), ("k", int)):
        checked(config.get(name), kind, f"'{name}' in {source}", null=True)


def _check_metrics(metrics, required, source):
    for name in (*required, *metrics):
        entry(metrics, name, float, source, null=True, low=0 if name in _NOT_NEGATIVE else None)


def check_protocol(protocol: dict[str, Any], source: str, ablation: bool = True) -> None:
    """Refuse a protocol that says too little, or other things than texts and numbers.

    Args:
        protocol (`dict`): How numbers were measured, as [`EvaluationReport`] has it.
        source (`str`): The file that holds it.
        ablation (`bool`, *optional*, defaults to `True`): Whether it says what ablations were.

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
    versions = entry(protocol, "versions", dict, source)
    for name in versions:
        entry(versions, name, str, source)
    checked(protocol.get("dataset_id"), str, f"'dataset_id' in {source}", null=True)
