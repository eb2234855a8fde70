"""Check drift baselines that are read from files."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import TranscoderError
from ..text.checked import checked, entry, only
from ..text.strict_json import parse_json
from .report_file import check_protocol


_METRICS = ("fvu", "normalized_mse", "l0", "ce_spliced", "kl_spliced")


def read_facts(text: str, source: str) -> dict[str, Any]:
    """Reads the metrics of a baseline, with NaN for numbers that were not finite.

    Raises:
        [`TranscoderError`]: an entry is missing or of the wrong kind.
    """
    facts = parse_json(text, source, allow_nan=True)
    only(facts, ("metrics", "ce", "together", "protocol"), source)
    metrics = entry(facts, "metrics", dict, source)
    for name in metrics:
        _check_numbers(entry(metrics, name, dict, source), _METRICS, source)
    _check_numbers(facts, ("ce",), source)
    if (together := checked(facts.get("together"), dict, f"'together' in {source}", null=True)) is not None:
        _check_numbers(together, ("ce_spliced", "kl_spliced"), source)
    check_protocol(entry(facts, "protocol", dict, source), source, ablation=False)
    return facts


def _check_numbers(holder, names, source):
    for name in names:
        value = holder.get(name, math.nan)
        is_nan = value is None or (isinstance(value, float) and math.isnan(value))
        holder[name] = math.nan if name in holder and is_nan else entry(holder, name, float, source)


def check_tensors(
    tensors: Mapping[str, Tensor], sizes: Mapping[str, int], tokens: Tensor, kl_rows: list[int], blocks: Tensor
) -> None:
    """Refuses tensors that do not belong to a probe.

    Args:
        tensors (`Mapping[str, Tensor]`): Tensors of the file.
        sizes (`Mapping[str, int]`): Number of features of each dictionary.
        tokens (`Tensor` of shape `(groups,)`): Number of tokens of each group of blocks.
        kl_rows (`list[int]`): Number of predictions of each batch that are compared.
        blocks (`Tensor` of shape `(blocks, seq)`): Token ids of the probe text.

    Raises:
        [`TranscoderError`]: a tensor is missing, has another shape or type, or is out of range.
    """
    for name, size in sizes.items():
        for part, most in (("fired", tokens[:, None]), ("activation", math.inf)):
            sums = _tensor(tensors, f"{name}/{part}", (len(tokens), size))
            if (sums < 0).any() or (sums > most).any():
                raise TranscoderError(f"'{name}/{part}' is out of its range")
        if ((tensors[f"{name}/activation"] > 0) & (tensors[f"{name}/fired"] == 0)).any():
            raise TranscoderError(f"'{name}/activation' has features that never fired")
        if f"{name}/peaks/values" in tensors:
            shape = (tensors[f"{name}/peaks/values"].shape[0], size)
            _tensor(tensors, f"{name}/peaks/values", shape)
            for part, most in (("rows", blocks.shape[0]), ("positions", blocks.shape[1])):
                places = _tensor(tensors, f"{name}/peaks/{part}", shape, whole=True)
                if places.numel() and (places.min() < 0 or places.max() >= most):
                    raise TranscoderError(f"'{name}/peaks/{part}' is out of its range")
    logits = [key for key in sorted(tensors) if key.startswith("kl_logits/")]
    if len(logits) != len(kl_rows):
        raise TranscoderError(f"it has predictions of {len(logits)} batches where this probe has {len(kl_rows)}")
    for key, rows in zip(logits, kl_rows, strict=True):
        width = tensors[logits[0]].shape[-1] if tensors[logits[0]].dim() else 0
        _tensor(tensors, key, (rows, width))
        if width <= int(blocks.max()):
            raise TranscoderError(f"'{key}' is of a smaller vocabulary than the probe text")


def _tensor(tensors, name, shape, whole=False):
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != shape or tensor.is_floating_point() == whole or tensor.is_complex():
        raise TranscoderError(f"'{name}' is missing, or of another shape or type")
    # There is no arithmetic in float8.
    if tensor.element_size() == 1 or (not whole and not tensor.isfinite().all()):
        raise TranscoderError(f"'{name}' is not of finite numbers")
    return tensor
