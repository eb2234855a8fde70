"""Check that rows sum to the measured values as far as rounding allows."""

import math

import torch

from ...text import logging


logger = logging.get_logger(__name__)

# Roundings of each term on its way to the stream, in the model's precision: two norms, values, patterns, output projection,
# MLP, and two additions.
_ROUNDINGS = 8
# Rows themselves are sums of up to a million terms in fp32: sqrt(1e6) * 1.2e-7.
_SUMMING = 1e-4
# The terms of a single row may cancel, so that its sum is this much smaller than the terms that were rounded.
_CANCELLATION = 64


def relative_tolerance(dtype: str) -> float:
    """Mean distance of rows from their totals that rounding explains, relative to the sums of their magnitudes.

    A rounding is uniform within half an epsilon of the rounded number, and roundings are independent. Deeper models have
    more of them and more terms in each row, so that the relative error does not grow: on twelve families of three
    layers and on SmolLM2-135M with thirty it is at most 0.21 of this in bf16 and in fp16, and 0.001 in fp32.

    Args:
        dtype (`str`): Precision of the model, such as `"bfloat16"`.
    """
    kind = getattr(torch, dtype, None)
    epsilon = torch.finfo(kind if isinstance(kind, torch.dtype) and kind.is_floating_point else torch.float32).eps
    return epsilon / math.sqrt(12) * math.sqrt(_ROUNDINGS) + _SUMMING


def row_warning(errors: torch.Tensor, matters: torch.Tensor, dtype: str, what: str) -> str | None:
    """The warning for rows that are further from their totals than rounding explains.

    Args:
        errors (`torch.Tensor` of shape `(rows,)`): Distance of each row from its total, relative to the row's magnitudes.
        matters (`torch.Tensor` of shape `(rows,)`): Weight of each row in the mean error.
        dtype (`str`): Precision of the model.
        what (`str`): Noun for the object that has the rows, such as `"graph"`.

    Returns:
        `str`, *optional*: one sentence; `None` within tolerance.
    """
    errors = errors.nan_to_num(math.inf)
    tolerance = relative_tolerance(dtype)
    mean = ((errors * matters)[matters > 0].sum() / matters.sum()).item()
    largest = errors.max().item()
    if mean <= tolerance and largest <= _CANCELLATION * tolerance:
        return None
    return (
        f"The rows of this {what} do not sum to the measured values: their mean error is {mean:.2g} of their size and the "
        f"largest {largest:.2g}, where rounding in {dtype} explains {tolerance:.1g}. The model does something that is not "
        "taken into account, such as a hook or an adapter, or its Architecture is wrong: do not trust the numbers, and "
        "compute them on the model without it."
    )


def sums_do_not_hold(
    dtype: torch.dtype, found: torch.Tensor, magnitudes: torch.Tensor, expected: torch.Tensor, what: str
) -> str | None:
    """The warning for sums of any kind that are further from the expected values than rounding explains.

    Args:
        dtype (`torch.dtype`): Precision of the model.
        found (`torch.Tensor` of shape `(rows,)`): The sums.
        magnitudes (`torch.Tensor` of shape `(rows,)`): Sums of the magnitudes of the terms.
        expected (`torch.Tensor` of shape `(rows,)`): The values that the sums should have.
        what (`str`): Noun for the object that has the sums.

    Returns:
        `str`, *optional*: one sentence; `None` within tolerance.
    """
    found, expected = found.double(), expected.double().to(found.device)
    size = torch.maximum(magnitudes.double(), expected.abs()).clamp(min=1e-30)
    return row_warning((found - expected).abs() / size, size, str(dtype).removeprefix("torch."), what)


def warn(text: str | None) -> None:
    """Log a warning, if there is one."""
    if text is not None:
        logger.warning(text)
