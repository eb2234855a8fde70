"""The index file of a set, and the names of its dictionaries."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import TranscoderError
from ..files import inner_path, write_text
from ..text.printable import printable
from .configuration_transcoder import FORMAT_VERSION, TranscoderConfig, check_format_version
from .saved_files import Files, damaged, parse_saved


INDEX_NAME = "transcoder_set.json"
# A name is a folder, part of a key of the state dict and, with "/" for ".", a module name, and must be unique as each.
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


def write_index(folder: str | os.PathLike, subfolders: Mapping[str, str], base_model: str | None) -> None:
    """
    Writes the index of a set into a folder of dictionaries.

    Args:
        folder (`str` or `os.PathLike`): Folder of the set.
        subfolders (`Mapping[str, str]`): Name of a dictionary -> its folder inside `folder`.
        base_model (`str`, *optional*): Base model of the dictionaries.
    """
    index = {
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": base_model,
        "dictionaries": {name: {"subfolder": subfolder} for name, subfolder in subfolders.items()},
    }
    write_text(Path(folder) / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def parse_index(text: str | bytes, source: str) -> dict[str, str]:
    """
    Reads the index of a set.

    Args:
        text (`str` or `bytes`): Content of the file.
        source (`str`): Path of the file, for messages.

    Returns:
        `dict[str, str]`: name of a dictionary -> its folder inside that of the set.

    Raises:
        [`TranscoderError`]: the index is damaged, has a newer format, or has a path outside of the set's folder.
    """
    index = parse_saved(text, source)
    entries = index.get("dictionaries")
    named = isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values())
    if not named or "format_version" not in index:
        raise damaged(source, "it does not say which dictionaries it has, and in which format")
    check_format_version(index["format_version"])
    check_names(entries)
    folders = {name: inner_path(entry.get("subfolder"), source) for name, entry in entries.items()}
    if len(set(folders.values())) < len(folders):
        raise TranscoderError(
            f"{printable(source)} has several dictionaries in one folder: copy or download it again, or save the set again."
        )
    return folders


def check_names(names: Iterable[str]) -> None:
    """Refuses names of dictionaries that are no names of folders."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise TranscoderError(
                f"'{printable(name)}' cannot name a dictionary, because its files go into a folder of that name: use letters, "
                "digits, '-', '_' and single dots between them."
            )


def dictionary_name(config: TranscoderConfig) -> str:
    """The name of a dictionary by its sites, such as `layers.8.mlp.transcoder` or `layers.8.mlp.branch.sae`."""
    if config.output_site is None:
        return "sae" if config.is_autoencoder else "transcoder"
    place = config.output_site.replace(":", ".")
    if config.is_autoencoder:
        return f"{place}.sae"
    for ending in (".branch", ".out"):
        place = place.removesuffix(ending)
    return f"{place}.{'skip_transcoder' if config.skip_connection else 'transcoder'}"


def has_index(files: Files) -> bool:
    """Whether a folder or repo has the index of a set."""
    try:
        return files.find(INDEX_NAME, optional=True) is not None
    except OSError:  # Said in a sentence where the index is opened.
        return True
