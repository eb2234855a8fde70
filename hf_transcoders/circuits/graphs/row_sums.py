"""Whether rows sum to what was measured, as far as the arithmetic lets them."""

import math
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from .influence import influence, row_magnitudes


if TYPE_CHECKING:
    from .graph import AttributionGraph
    from .linear_run import LinearRun


logger = logging.get_logger(__name__)

# Roundings of each term on its way to the stream, in the model's precision: two norms, values, patterns, output projection,
# MLP, and two additions.
_ROUNDINGS = 8
# Rows themselves are sums of up to a million terms in fp32: sqrt(1e6) * 1.2e-7.
_SUMMING = 1e-4
# A single row may cancel, so that it is as much smaller than what was rounded.
_CANCELLATION = 64


def relative_tolerance(dtype: str) -> float:
    """How far rows are from their totals on average by rounding, relative to the sums of their magnitudes.

    A rounding is uniform within half an epsilon of what is rounded, and roundings are independent. Deeper models have
    more of them and more terms in each row, so that the relative error does not grow: on twelve families of three
    layers and on SmolLM2-135M with thirty it is at most 0.21 of this in bf16 and in fp16, and 0.001 in fp32.

    Args:
        dtype (`str`): Precision of the model, such as `"bfloat16"`.
    """
    kind = getattr(torch, dtype, None)
    epsilon = torch.finfo(kind if isinstance(kind, torch.dtype) and kind.is_floating_point else torch.float32).eps
    return epsilon / math.sqrt(12) * math.sqrt(_ROUNDINGS) + _SUMMING


def row_errors(graph: "AttributionGraph") -> torch.Tensor:
    """How far each row is from its total, relative to the sum of its magnitudes.

    Returns:
        `torch.Tensor` of shape `(nodes,)`: NaN for nodes without a row.
    """
    sums = graph.rest.double().index_add(0, graph.target, graph.weight.double())
    return (sums - graph.total.double()).abs() / torch.maximum(row_magnitudes(graph), graph.total.double().abs())


def rows_do_not_sum(graph: "AttributionGraph") -> str | None:
    """The sentence that says so, if rows of a graph are further from their totals than rounding explains."""
    # Differences of graphs cancel; their parts have been looked at.
    if any(how in graph.metadata for how in ("contrast", "union")):
        return graph.metadata.get("warning")
    # Targets always have a row, if not one of numbers.
    rows = graph.expanded | graph.is_kind("target")
    matters = (influence(graph) + graph.target_weights)[rows]
    return _sentence(row_errors(graph)[rows], matters, graph.metadata.get("dtype") or "float32", "graph")


def sums_do_not_hold(
    run: "LinearRun", found: torch.Tensor, magnitudes: torch.Tensor, expected: torch.Tensor, what: str
) -> str | None:
    """As [`rows_do_not_sum`], for sums of any kind.

    Args:
        run ([`LinearRun`]): The run that they explain.
        found, magnitudes, expected (`torch.Tensor` of shape `(rows,)`): The sums, those of the magnitudes of what is
            summed, and what they should be.
        what (`str`): What has these rows.
    """
    found, expected = found.double(), expected.double().to(found.device)
    size = torch.maximum(magnitudes.double(), expected.abs()).clamp(min=1e-30)
    return _sentence((found - expected).abs() / size, size, str(run.model.dtype).removeprefix("torch."), what)


def warn(text: str | None):
    """Log a sentence, if there is one."""
    if text is not None:
        logger.warning(text)


def _sentence(errors, matters, dtype, what):
    """The warning for the relative errors of some rows, weighted by how much each row matters; `None` within tolerance."""
    errors = errors.nan_to_num(math.inf)
    tolerance = relative_tolerance(dtype)
    mean = ((errors * matters)[matters > 0].sum() / matters.sum()).item()
    largest = errors.max().item()
    if mean <= tolerance and largest <= _CANCELLATION * tolerance:
        return None
    return (
        f"The rows of this {what} do not sum to what was measured: on average they miss {mean:.2g} of their size, and up to "
        f"{largest:.2g}, where rounding in {dtype} explains {tolerance:.1g}. The model does something that is not taken into "
        "account, such as a hook or an adapter, or its Architecture is wrong: do not trust the numbers, and take them from "
        "the model without it."
    )
