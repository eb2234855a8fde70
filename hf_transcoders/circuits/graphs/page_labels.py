"""Labels of features for the page of a graph, and the files that the page saves."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import TranscoderError
from ...text.checked import checked, entries, entry
from ...text.printable import printable
from ...text.strict_json import read_json


if TYPE_CHECKING:
    from .graph import AttributionGraph


#: Entry `format` of the files. `FORMAT` and `LONGEST` are also in the script of the page (`saved.js`).
FORMAT = "hf_transcoders graph labels"
#: Largest number of characters of a label or of the name of a group.
LONGEST = 200


def page_labels(
    labels: str | os.PathLike | Mapping[str, Mapping[int, str]] | None, graphs: "Sequence[AttributionGraph]"
) -> dict[str, Any]:
    """Read and check labels for a page.

    Args:
        labels (`str`, `os.PathLike` or `Mapping[str, Mapping[int, str]]`, *optional*):
            A file that a page saved, with labels, pins and groups; or dictionary -> feature -> label.
        graphs (`Sequence[AttributionGraph]`): The graphs of the page.

    Returns:
        `dict`: `labels`, dictionary -> feature as text -> label, and `graphs`, a list of `prompt`, `pins` and `groups`.

    Raises:
        [`TranscoderError`]: the file cannot be read or is of another kind, a label is no text, or there are only labels for
            dictionaries that the graphs do not have.
    """
    if labels is None:
        return {"labels": {}, "graphs": []}
    known = {name for graph in graphs for name in graph.dictionaries}
    if isinstance(labels, str | os.PathLike):
        found, where = read_labels(labels), printable(labels)
    else:
        found, where = {"labels": _checked_labels(labels, "labels"), "graphs": []}, "`labels`"
    if found["labels"] and not known & set(found["labels"]):
        raise TranscoderError(
            f"{where} has labels for {printable(', '.join(found['labels']))[:200]}, but the page has features of "
            f"{', '.join(sorted(known)) or 'no dictionary'}: give labels for these."
        )
    return found


def read_labels(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file that a page saved.

    Args:
        path (`str` or `os.PathLike`): The file.

    Returns:
        `dict`: as for [`page_labels`].

    Raises:
        [`TranscoderError`]: the file cannot be read or is of another kind.
    """
    data, file = read_json(Path(path)), str(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise TranscoderError(
            f"{printable(file)} is not a file of labels: give a file that the page of a graph saved (button Save)."
        )
    return {
        "labels": _checked_labels(entry(data, "labels", dict, file), file),
        "graphs": [_saved_graph(each, file) for each in entries(data, "graphs", dict, file)],
    }


def _checked_labels(labels, where):
    found = {}
    for name, of_features in labels.items():
        found[str(name)] = {}
        if not isinstance(of_features, Mapping):
            checked(of_features, dict, f"'{name}' in {where}")
        for feature, label in of_features.items():
            if not str(feature).isdecimal():
                raise TranscoderError(
                    f"'{printable(feature)[:80]}' of '{printable(name)}' in {printable(where)} is not the number of a feature: "
                    "write labels as {dictionary: {feature: label}}."
                )
            found[str(name)][str(int(feature))] = _text(label, f"The label of feature {feature} in {where}")
    return found


def _saved_graph(saved, file):
    groups = [
        {"name": _text(entry(group, "name", str, file), f"The name of a group in {file}"),
         "members": entries(group, "members", str, file)}
        for group in entries(saved, "groups", dict, file)
    ]  # fmt: skip
    return {"prompt": entry(saved, "prompt", str, file), "pins": entries(saved, "pins", str, file), "groups": groups}


def _text(value, where):
    if not checked(value, str, where).strip() or len(value) > LONGEST:
        raise TranscoderError(f"{printable(where)} has {len(value):,} characters: give 1 to {LONGEST}.")
    return value.strip()
