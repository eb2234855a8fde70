"""Check values from untrusted files before they are used: types, ranges and required fields."""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import TranscoderError
from .printable import printable


_NAMES = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object", list: "a list",
}  # fmt: skip
# Bounds of integer tensors, and of numbers that can be squared and summed in float64 and stored in float32.
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
    """Return a value from a file if it has the right type and is in range.

    Args:
        value (`Any`): Value, as read from JSON.
        kind (`type`):
            Expected type: `str`, `int`, `float` (any finite number), `bool`, `dict` or `list`. `True` is not a number.
        where (`str`): Description of the value and its file, for the error message.
        null (`bool`, *optional*, defaults to `False`): Whether `None` is accepted.
        low, high (`float`, *optional*): Smallest and largest accepted number.

    Raises:
        [`TranscoderError`]: The value has another type or is out of range.
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
            f"{printable(where)} is {_shown(value)}, but must be {' '.join([_NAMES[kind], *bounds])}: the file is damaged "
            "or of another kind."
        )
    return value


def entry(holder: Mapping[str, Any], name: str, kind: type, source: str, **options) -> Any:
    """Return a required entry of an object in a file; further arguments as for [`checked`].

    Raises:
        [`TranscoderError`]: The entry is missing, has another type or is out of range.
    """
    if name not in holder:
        raise TranscoderError(f"{printable(source)} lacks '{name}': it is damaged or of another kind.")
    return checked(holder[name], kind, f"'{name}' in {source}", **options)


def entries(holder: Mapping[str, Any], name: str, kind: type, source: str, **options) -> list:
    """Return a required list in a file whose items all have one type; further arguments as for [`checked`]."""
    values = entry(holder, name, list, source)
    for number, value in enumerate(values):
        checked(value, kind, f"Item {number} of '{name}' in {source}", **options)
    return values


def only(holder: Mapping[str, Any], names, source: str) -> None:
    """Refuse an object that has entries with other names.

    Raises:
        [`TranscoderError`]: The object has an unknown entry.
    """
    if unknown := [name for name in holder if name not in names]:
        raise TranscoderError(
            f"{printable(source)} has an entry '{printable(unknown[0])[:80]}' that this version does not know: upgrade, or "
            "write the file again."
        )


def _shown(value):
    if isinstance(value, dict | list):
        return _NAMES[type(value)]
    # Python refuses to convert integers with too many digits to text.
    if isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
        return "a number that is far too large"
    return "null" if value is None else printable(repr(value))[:60]
