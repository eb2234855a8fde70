"""Read JSON and YAML from strangers, and write JSON that every reader accepts.

Python's reader accepts more than JSON (`NaN`, repeated keys, lone surrogates) and fails in many ways (deep nesting is a
`RecursionError`, a number of 5,000 digits a `ValueError`, bytes that are not UTF-8 a `UnicodeDecodeError`). Here all of
these are one [`TranscoderError`] that names the file.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from ..errors import TranscoderError
from .printable import printable


# Half of a surrogate pair can be written as an escape, but no UTF-8 file can hold it.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_KIND_NAMES = {dict: "an object", list: "a list", str: "a string"}


def read_json(path: str | os.PathLike, kind: type = dict, *, allow_nan: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path (`str` or `os.PathLike`):
            The file, in UTF-8.
        kind (`type`, *optional*, defaults to `dict`):
            What the file must hold at its top: `dict`, `list` or `object` (anything).
        allow_nan (`bool`, *optional*, defaults to `False`):
            Whether `NaN` and `Infinity` are accepted, as in files that the Transformers `Trainer` writes.

    Raises:
        [`TranscoderError`]: the file cannot be read, is not JSON, or holds something else.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise TranscoderError(f"{printable(path)} cannot be read: {error.strerror or error}.") from error
    return parse_json(content, str(path), kind, allow_nan=allow_nan)


def parse_json(text: str | bytes, source: str, kind: type = dict, *, allow_nan: bool = False) -> Any:
    """Parse JSON text.

    Args:
        text (`str` or `bytes`): The JSON, in UTF-8 if `bytes`.
        source (`str`): The file that holds the text, for the message.
        kind, allow_nan: As for [`read_json`].

    Raises:
        [`TranscoderError`]: the text is not JSON, or holds something else.
    """

    def refuse_constant(name):
        raise ValueError(f"{name} is not JSON")

    def finite(digits):
        number = float(digits)
        if math.isinf(number):
            raise ValueError(f"the number {digits[:20]} is too large")
        return number

    constants = {} if allow_nan else {"parse_constant": refuse_constant, "parse_float": finite}
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique_keys, **constants)
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise TranscoderError(f"{printable(source)} is nested too deeply to be read.") from None
    except UnicodeError:
        raise TranscoderError(f"{printable(source)} is not valid UTF-8 text.") from None
    except ValueError as error:
        raise TranscoderError(f"{printable(source)} is not valid JSON: {printable(error)[:200]}.") from None
    if not isinstance(value, kind):
        raise TranscoderError(
            f"{printable(source)} must hold {_KIND_NAMES.get(kind, kind.__name__)} at its top, not {_name_of(value)}."
        )
    return value


def to_json(value: Any, indent: int | None = 2, **options) -> str:
    """Write a value as JSON that every reader accepts: numbers that are not finite become `null`.

    Args:
        value (`Any`): Dicts, lists, tuples, strings, numbers, booleans and `None`.
        indent (`int`, *optional*, defaults to 2): Spaces for each level; `None` writes one line.
        options: Further arguments of `json.dumps`.
    """
    return json.dumps(finite(value), indent=indent, allow_nan=False, **options)


def finite(value: Any) -> Any:
    """A copy of a JSON value in which `None` stands for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def read_yaml(path: str | os.PathLike, kind: type = dict) -> Any:
    """Read a YAML file; as [`read_json`], repeated keys are refused.

    Args:
        path (`str` or `os.PathLike`): The file, in UTF-8.
        kind (`type`, *optional*, defaults to `dict`): What the file must hold at its top.

    Raises:
        [`TranscoderError`]: the file cannot be read, is not YAML, or holds something else.
    """
    import yaml

    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        value = yaml.load(text, Loader=_unique_key_loader())
    except OSError as error:
        raise TranscoderError(f"{printable(path)} cannot be read: {error.strerror or error}.") from error
    except RecursionError:
        raise TranscoderError(f"{printable(path)} is nested too deeply to be read.") from None
    except UnicodeError:
        raise TranscoderError(f"{printable(path)} is not valid UTF-8 text.") from None
    # PyYAML lets the errors of int(), float() and date() through.
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise TranscoderError(f"{printable(path)} is not valid YAML: {printable(error)[:300]}.") from None
    if not isinstance(value, kind):
        raise TranscoderError(
            f"{printable(path)} must hold {_KIND_NAMES.get(kind, kind.__name__)} at its top, not {_name_of(value)}."
        )
    return value


def _unique_key_loader():
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        """Loads plain data only, and refuses a mapping in which a key stands twice."""

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice", key_node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

    return UniqueKeyLoader


def _unique_keys(pairs):
    result = dict(pairs)
    if len(result) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} stands twice")
    return result


def _name_of(value):
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "a string", bool: "true or false"}.get(type(value), "a number")
