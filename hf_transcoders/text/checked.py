"""Values of files from anywhere, checked before they are used: types, ranges, required fields."""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import TranscoderError
from .printable import printable


_NAMES = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object", list: "a list",
}  # fmt: skip
# What fits a tensor of indices, and what can be drawn, squared and summed in float64 and kept in float32.
_LARGEST_WHOLE, _LARGEST_NUMBER = 2**63 - 1, 1e30


def checked(
    value: Any,
    kind: type,
    where: str,
    *,
    null: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A value of a file, if it is of its kind and in its range.

    Args:
        value (`Any`): The value, as JSON has it.
        kind (`type`):
            `str`, `int`, `float` (any finite number), `bool`, `dict` or `list`. `True` is no number.
        where (`str`): What the value is and which file holds it, for the message.
        null (`bool`, *optional*, defaults to `False`): Whether `None` is accepted.
        low, high (`float`, *optional*): The least and the greatest number that is accepted.

    Raises:
        [`TranscoderError`]: it is something else, or out of its range.
    """
    if value is None and null:
        return None
    if kind is float:
        fits = type(value) in (int, float) and abs(value) <= _LARGEST_NUMBER and math.isfinite(value)
    elif kind is int:
        fits = type(value) is int and abs(value) <= _LARGEST_WHOLE
    else:
        fits = type(value) is kind
    if not fits or (low is not None and value < low) or (high is not None and value > high):
        bounds = [f"of at least {low}"] * (low is not None) + [f"of at most {high}"] * (high is not None)
        raise TranscoderError(
            f"{printable(where)} is {_shown(value)}, but must be {' '.join([_NAMES[kind], *bounds])}: the file is damaged or "
            "not what it is taken for."
        )
    return value


def entry(holder: Mapping[str, Any], name: str, kind: type, source: str, **options) -> Any:
    """A required entry of an object in a file; further arguments as for [`checked`].

    Raises:
        [`TranscoderError`]: it is missing, of another kind or out of its range.
    """
    if name not in holder:
        raise TranscoderError(f"{printable(source)} lacks '{name}': it is damaged or not what it is taken for.")
    return checked(holder[name], kind, f"'{name}' in {source}", **options)


def entries(holder: Mapping[str, Any], name: str, kind: type, source: str, **options) -> list:
    """A required list in a file, whose items are all of one kind; further arguments as for [`checked`]."""
    values = entry(holder, name, list, source)
    for number, value in enumerate(values):
        checked(value, kind, f"Item {number} of '{name}' in {source}", **options)
    return values


def only(holder: Mapping[str, Any], names, source: str) -> None:
    """Refuse an object with entries of other names.

    Raises:
        [`TranscoderError`]: it has one.
    """
    if unknown := [name for name in holder if name not in names]:
        raise TranscoderError(
            f"{printable(source)} has an entry '{printable(unknown[0])[:80]}' that this version does not know: upgrade, or "
            "write the file again."
        )


def _shown(value):
    if isinstance(value, dict | list):
        return _NAMES[type(value)]
    # A whole number may have more digits than Python turns into text.
    if isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
        return "a number out of all bounds"
    return "null" if value is None else printable(repr(value))[:60]
