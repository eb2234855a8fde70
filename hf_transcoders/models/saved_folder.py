"""Find the dictionaries in a local folder, and the files that a save into it leaves outdated."""

from collections.abc import Collection
from pathlib import Path

from ..errors import TranscoderError
from ..files import is_inside
from ..text.strict_json import read_json
from .configuration_transcoder import TranscoderConfig
from .saved_files import CONFIG_NAME, DICTIONARY_TYPES, WEIGHT_FILES
from .set_index import INDEX_NAME, dictionary_name, parse_index


def saved_dictionaries(folder: Path) -> dict[str, str]:
    """
    The dictionaries that were saved in a folder, by the files of both formats.

    Args:
        folder (`Path`): Folder of a dictionary or a set, or of both if two runs have written into it.

    Returns:
        `dict[str, str]`: name of each dictionary -> its folder inside `folder`; `""` for a single dictionary, whose files are
        in `folder` itself.
    """
    found = _members(folder)
    if (name := _own_name(folder)) is not None:
        found[name if name not in found else f"{name} (alone)"] = ""
    return found


def outdated_files(folder: Path, written: Collection[str]) -> list[str]:
    """
    The files of an earlier dictionary or set in a folder that would be loaded together with a new save, or instead of it.

    Args:
        folder (`Path`): Folder of the save.
        written (`Collection[str]`): Folders inside it into which the new save writes dictionaries; `""` is `folder` itself.

    Returns:
        `list[str]`: paths inside the folder.
    """
    earlier = {place for place in saved_dictionaries(folder).values() if place not in written}
    files = [
        path.relative_to(folder).as_posix()
        for place in earlier
        for pattern in (CONFIG_NAME, WEIGHT_FILES)
        for path in (folder / place).glob(pattern)
    ]
    if "" in written and (folder / INDEX_NAME).is_file():
        files.append(INDEX_NAME)
    return files


def _members(folder: Path) -> dict[str, str]:
    """Name -> folder of the dictionaries of the set in a folder, without those that lie outside of it."""
    path = folder / INDEX_NAME
    try:
        members = parse_index(path.read_bytes(), str(path)) if path.is_file() else {}
    except (OSError, TranscoderError):
        # A damaged index names no files that are sure to belong to a set.
        return {}
    return {name: place for name, place in members.items() if is_inside(folder / place, folder)}


def _own_name(folder: Path) -> str | None:
    """The name of the single dictionary in a folder; `None` if there is none, or another model."""
    try:
        fields = read_json(folder / CONFIG_NAME)
    except TranscoderError:
        return None
    if fields.get("model_type") not in DICTIONARY_TYPES:
        return None
    try:
        return dictionary_name(TranscoderConfig.from_dict(fields))
    except Exception:  # Another kind, a newer version or a damaged file: it is a dictionary all the same.
        return "a dictionary"
