"""Read JSON and YAML from untrusted files, and write JSON that every reader accepts.

Python's reader accepts more than JSON (`NaN`, repeated keys, lone surrogates) and raises many errors (`RecursionError` for
deep nesting, `ValueError` for a number of 5,000 digits, `UnicodeDecodeError` for bytes that are not UTF-8). Here, all of
these are a [`TranscoderError`] that names the file.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import TranscoderError
from .printable import printable


# Lone surrogates can be written as escapes, but not in UTF-8.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_KIND_NAMES = {dict: "an object", list: "a list", str: "a string"}


def _refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def _finite_number(digits):
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


def _unique_keys(pairs):
    result = dict(pairs)
    if len(result) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} is repeated")
    return result


_STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_number)
_LENIENT = json.JSONDecoder(object_pairs_hook=_unique_keys)
_BLANK = re.compile(r"[ \t\n\r]*")


@contextmanager
def _explained(source):
    """Turn all errors of Python's reader into one sentence."""
    try:
        yield
    except RecursionError:
        raise TranscoderError(f"{printable(source)} is nested too deeply to be read.") from None
    except UnicodeError:
        raise TranscoderError(f"{printable(source)} is not valid UTF-8 text.") from None
    except ValueError as error:
        raise TranscoderError(f"{printable(source)} is not valid JSON: {printable(error)[:200]}.") from None


def _refuse_surrogates(text, value):
    if "\\u" in text and _SURROGATE_ESCAPE.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")


def read_json(path: str | os.PathLike, kind: type = dict, *, allow_nan: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path (`str` or `os.PathLike`):
            File in UTF-8.
        kind (`type`, *optional*, defaults to `dict`):
            Expected type of the top-level value: `dict`, `list` or `object` (any).
        allow_nan (`bool`, *optional*, defaults to `False`):
            Whether `NaN` and `Infinity` are accepted, as in files that the Transformers `Trainer` writes.

    Raises:
        [`TranscoderError`]: The file cannot be read, is not JSON, or has another top-level type.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise TranscoderError(f"{printable(path)} cannot be read: {error.strerror or error}.") from error
    return parse_json(content, str(path), kind, allow_nan=allow_nan)


def parse_json(text: str | bytes, source: str, kind: type = dict, *, allow_nan: bool = False) -> Any:
    """Parse JSON text.

    Args:
        text (`str` or `bytes`): JSON text; `bytes` are decoded as UTF-8.
        source (`str`): Name of the file, for the error message.
        kind, allow_nan: As for [`read_json`].

    Raises:
        [`TranscoderError`]: The text is not JSON, or has another top-level type.
    """

    with _explained(source):
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = (_LENIENT if allow_nan else _STRICT).decode(text)
        _refuse_surrogates(text, value)
    if not isinstance(value, kind):
        raise TranscoderError(
            f"{printable(source)} must hold {_KIND_NAMES.get(kind, kind.__name__)} at the top level, not {_name_of(value)}."
        )
    return value


def json_items(text: str | bytes, source: str) -> Iterator[Any]:
    """Iterate over the items of a JSON list without holding the whole list in memory.

    Args:
        text (`str` or `bytes`): JSON text; `bytes` are decoded as UTF-8.
        source (`str`): Name of the file, for the error message.

    Raises:
        [`TranscoderError`]: The text is not a list, or not JSON; items before the error have already been yielded.
    """
    with _explained(source):
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    start = _BLANK.match(text).end()
    if text[start : start + 1] != "[":
        parse_json(text, source, list)
    start = _BLANK.match(text, start + 1).end()
    expected = text[start : start + 1] != "]"
    while expected:
        with _explained(source):
            value, end = _STRICT.raw_decode(text, start)
            _refuse_surrogates(text[start:end], value)
        yield value
        start = _BLANK.match(text, end).end()
        expected = text[start : start + 1] == ","
        if expected:
            start = _BLANK.match(text, start + 1).end()
    with _explained(source):
        if text[start : start + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, start)
        if text[start + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, start + 1)


def to_json(value: Any, indent: int | None = 2, **options) -> str:
    """Format a value as JSON that every reader accepts; numbers that are not finite become `null`.

    Args:
        value (`Any`): Dicts, lists, tuples, strings, numbers, booleans and `None`.
        indent (`int`, *optional*, defaults to 2): Spaces per level; with `None`, the result is one line.
        options: Further arguments of `json.dumps`.
    """
    return json.dumps(finite(value), indent=indent, allow_nan=False, **options)


def finite(value: Any) -> Any:
    """Copy a JSON value, replacing numbers that are not finite by `None`."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def read_yaml(path: str | os.PathLike, kind: type = dict, scalar: Callable[[str, Any], Any] | None = None) -> Any:
    """Read a YAML file, in which repeated keys are refused as in [`read_json`].

    Args:
        path (`str` or `os.PathLike`): File in UTF-8.
        kind (`type`, *optional*, defaults to `dict`): Expected type of the top-level value.
        scalar (`Callable`, *optional*):
            Function of the text and the parsed value of every scalar that is not a string, such as `010` or `yes`, that
            returns the value to use. By default, the parsed value.

    Raises:
        [`TranscoderError`]: The file cannot be read, is not YAML, or has another top-level type.
    """
    import yaml

    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        value = yaml.load(text, Loader=_unique_key_loader(scalar))
    except OSError as error:
        raise TranscoderError(f"{printable(path)} cannot be read: {error.strerror or error}.") from error
    except RecursionError:
        raise TranscoderError(f"{printable(path)} is nested too deeply to be read.") from None
    except UnicodeError:
        raise TranscoderError(f"{printable(path)} is not valid UTF-8 text.") from None
    # PyYAML does not catch the errors of int(), float() and date().
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split()).rstrip(".")
        raise TranscoderError(f"{printable(path)} is not valid YAML: {printable(reason)[:300]}.") from None
    if not isinstance(value, kind):
        raise TranscoderError(
            f"{printable(path)} must hold {_KIND_NAMES.get(kind, kind.__name__)} at the top level, not {_name_of(value)}."
        )
    return value


def _unique_key_loader(scalar):
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        """Loads plain data only, and refuses repeated keys."""

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} is repeated", key_node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

        def construct_object(self, node, deep=False):
            value = super().construct_object(node, deep)
            if scalar is None or isinstance(value, str | dict | list) or not isinstance(node, yaml.ScalarNode):
                return value
            return scalar(node.value, value)

    return UniqueKeyLoader


def _name_of(value):
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "a string", bool: "true or false"}.get(type(value), "a number")
