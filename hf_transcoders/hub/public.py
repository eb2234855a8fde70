"""Remove local paths from names and texts before they are published."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..hub_ids import is_hub_id


# Absolute, home-relative and relative paths of POSIX and Windows; not inside a word, a link or another path.
_START = r"(?:file:[/\\]+|~[\w.-]*[/\\]|\.{1,2}[/\\]|/|[A-Za-z]:[/\\]|\\\\)"
_PATH = re.compile(rf"""(?<![\w:/.~\\-]){_START}[^\s"'`<>|*?,;()\[\]{{}}]+""")
_WHOLE_PATH = re.compile(rf"{_START}[^\n]+")
_CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")
# Endings of keys whose values are local folders and files, and of those whose values are models.
_PLACES = ("_dir", "_folder", "_file", "_checkpoint")
_NAMES = ("model", "name_or_path", "run_name", "from")


def public_name(name: str | None) -> str | None:
    """
    The public name of a model: a Hub id as it is, and the last part of the path of a local folder.

    Args:
        name (`str`, *optional*): Hub id, or path as POSIX or Windows write it.
    """
    if name is None or is_hub_id(name):
        return name
    if cached := _CACHED.search(name):
        return f"{cached[1]}/{cached[2]}"
    return _last_part(name)


def public_text(text: str, names: Mapping[str, str] | None = None) -> str:
    """
    A copy of a text in which every local path is cut to its last part.

    Args:
        text (`str`): The text.
        names (`Mapping[str, str]`, *optional*): Further names to hide -> their replacements.
    """
    for name, public in (names or {}).items():
        text = text.replace(name, public)
    return _PATH.sub(lambda found: public_name(found[0]), text)  # pyright: ignore[reportCallIssue]


def public_values(value: Any, names: Mapping[str, str] | None = None, key: str = "") -> Any:
    """
    A copy of JSON values in which every local path is cut to its last part.

    Args:
        value (`Any`): Dicts, lists, texts, numbers.
        names (`Mapping[str, str]`, *optional*): Same as in [`public_text`].
        key (`str`, *optional*): Key of the value in its object.
    """
    if isinstance(value, str) and value:
        if key.endswith(_PLACES):
            return _last_part(value)
        if key.endswith(_NAMES) or _WHOLE_PATH.fullmatch(value):
            return public_name(value)
        return public_text(value, names)
    if isinstance(value, dict):
        return {name: public_values(entry, names, str(name)) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [public_values(entry, names, key) for entry in value]
    return value


def hidden_names(names: Iterable[Any]) -> dict[str, str]:
    """Names of models that contain a local path -> their public names."""
    given = {name for name in names if isinstance(name, str) and name}
    return {name: public_name(name) for name in sorted(given, key=len, reverse=True) if public_name(name) != name}


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[/\\:]+", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else "unnamed"
