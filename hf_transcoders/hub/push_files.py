"""Select the files of a push: dictionaries, facts from training, and the records of the run."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import get_token

from ..errors import TranscoderError
from ..files import is_inside
from ..models.model_types import saved_config
from ..models.saved_files import (
    CONFIG_NAME,
    DICTIONARY_TYPES,
    EXPLANATIONS_NAME,
    Files,
    open_dictionary,
    parse_saved,
)
from ..models.set_index import INDEX_NAME, parse_index
from ..models.transcoder_set import set_folders
from ..text import logging
from ..text.printable import printable
from ..text.strict_json import read_json, to_json
from ..tracking.local import ALERTS, FOLDER, HISTOGRAMS, IMAGES, RUN_FILE, SCALARS, TABLES, read_lines
from ..tracking.run import Run
from .public import hidden_names, public_values
from .remote_code import AUTO_MAP, CODE_FILES, remote_code_files, write_remote_code


logger = logging.get_logger(__name__)

# Files of one dictionary, as `save_pretrained` names them.
_DICTIONARY_FILE = re.compile(
    rf"config\.json|{re.escape(EXPLANATIONS_NAME)}|"
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|" + "|".join(map(re.escape, CODE_FILES))
)
_PNG = b"\x89PNG\r\n\x1a\n"
# Files of a training run that are useful to others.
_FACTS = ("evaluation.json", "training_args.json")


def dictionary_files(folder: str | os.PathLike) -> dict[str, Path]:
    """
    Lists the files of the dictionary or set in a folder, and the facts from its training. Code that is not from this package
    is left out, and symbolic links to files outside of the folder are refused.

    Returns:
        `dict[str, Path]`: path inside the folder, with `/` -> file.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).is_file():
        inside = [path.relative_to(folder) for path in set_folders(folder).values()]
        found = [Path(INDEX_NAME), *map(Path, CODE_FILES)]
    elif (folder / "config.json").is_file():
        inside, found = [Path()], []
    else:
        raise TranscoderError(
            f"{folder} holds neither a dictionary (config.json) nor a set ({INDEX_NAME}): give the folder that training or "
            "`save_pretrained` wrote."
        )
    for part in inside:
        names = [path.name for path in (folder / part).iterdir()] if (folder / part).is_dir() else []
        if "config.json" not in names:
            raise TranscoderError(f"The set in {folder} has no dictionary '{part}': copy or save it again.")
        found += [part / name for name in names if _DICTIONARY_FILE.fullmatch(name)]
    found += map(Path, _FACTS)
    return {path.as_posix(): folder / path for path in found if _may_go(path, folder)}


def _may_go(path: Path, folder: Path) -> bool:
    """Whether a file exists and may be published."""
    file = folder / path
    if not file.is_file():
        return False
    if not is_inside(file, folder):
        raise TranscoderError(
            f"{printable(file)} is a link to a file outside of {printable(folder)}, which is not published: put the file itself "
            "there, or remove the link."
        )
    if path.name in CODE_FILES and file.read_bytes() != remote_code_files()[path.name].encode():
        logger.warning(
            f"{file} is not the model's code as this version of hf_transcoders has it and is not pushed: push with "
            "`remote_code=True` to write it again."
        )
        return False
    return True


def published(files: Mapping[str, Path], records: Mapping[str, Path] | None = None) -> dict[str, Path | bytes]:
    """
    Prepares files for the Hub: descriptions and records without local paths, and configurations without references to code
    that is not pushed.

    Args:
        files (`Mapping[str, Path]`): Path in the repo -> file, as [`dictionary_files`] finds them.
        records (`Mapping[str, Path]`, *optional*): Path in the repo -> file, as [`run_records`] finds them.

    Returns:
        `dict[str, Path | bytes]`: path in the repo -> file, or its changed content.
    """
    descriptions = {
        path: file for path, file in files.items() if PurePosixPath(path).name in (INDEX_NAME, CONFIG_NAME)
    }
    found = {path: parse_saved(file.read_bytes(), str(file)) for path, file in descriptions.items()}
    names = hidden_names(values.get("base_model_name_or_path") for values in found.values())
    for path, values in found.items():
        code = {PurePosixPath(path).with_name(name).as_posix() for name in CODE_FILES}
        if "auto_map" in values and (values["auto_map"] != AUTO_MAP or not code <= files.keys()):
            del values["auto_map"]
    result: dict[str, Path | bytes] = dict(files)
    for path, values in found.items():
        result[path] = _content(values, names, sort_keys=path not in (INDEX_NAME,))
    for path, file in ((path, file) for path, file in files.items() if path in _FACTS):
        result.pop(path)
        if (values := _readable(file)) is not None:
            result[path] = _content(values, names)
    for path, file in (records or {}).items():
        if path.endswith(".json") and (values := _readable(file)) is not None:
            result[path] = _content(values, names)
        elif path.endswith(".jsonl"):
            # Example texts of features are published unchanged.
            shown = (
                read_lines(file) if "/tables/" in path else [public_values(line, names) for line in read_lines(file)]
            )
            result[path] = "".join(json.dumps(line) + "\n" for line in shown).encode()
        elif path.endswith(".png") and file.read_bytes().startswith(_PNG):
            result[path] = file
    return result


def check_weights(files: Mapping[str, Path]) -> None:
    """Refuses dictionaries whose weights do not match their configurations, by the headers of the files."""
    for path, file in files.items():
        if PurePosixPath(path).name == CONFIG_NAME:
            saved_config(open_dictionary(Files(file.parent)))


def _content(values: Mapping[str, Any], names: Mapping[str, str], **options) -> bytes:
    return (to_json(public_values(values, names), **options) + "\n").encode()


def _readable(file: Path) -> dict[str, Any] | None:
    """The content of a JSON file; `None`, with a warning, if it cannot be read."""
    try:
        return read_json(file, allow_nan=True)
    except TranscoderError as error:
        logger.warning(f"{str(error).removesuffix('.')}, and is not pushed.")
        return None


@contextlib.contextmanager
def with_remote_code(folder: str | os.PathLike) -> Iterator[Path]:
    """A temporary copy of the dictionary or set in a folder, with the model's code."""
    with tempfile.TemporaryDirectory() as copy:
        for name, path in dictionary_files(folder).items():
            link_or_copy(path, Path(copy, name))
        write_remote_code(copy)
        yield Path(copy)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-links a file that will not be overwritten, or copies it where the disk has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def run_records(run: Run | None, largest: int = 10 * 2**20) -> dict[str, Path]:
    """
    Selects the records of a run that are useful to others: facts, curves, histograms, tables and pictures.

    Args:
        run ([`Run`], *optional*): Recorded run.
        largest (`int`, *optional*, defaults to 10 MiB): Size in bytes of the largest file to publish.

    Returns:
        `dict[str, Path]`: path in the repo -> file. A file that may contain an access token is left out.
    """
    if run is None or run.folder is None:
        return {}
    found = {}
    for path in sorted((run.folder / "tracking").rglob("*")):
        name = path.relative_to(run.folder).as_posix()
        if not is_record(name) or not path.is_file() or path.stat().st_size > largest:
            continue
        if not is_inside(path, run.folder):
            logger.warning(f"{path} is a link to a file outside of {run.folder} and is not pushed.")
            continue
        if _holds_token(path.read_bytes()):
            logger.warning(f"{path} holds what looks like an access token and is not pushed.")
            continue
        found[name] = path
    return found


def is_record(path: str) -> bool:
    """Whether a path in a repo is one of a record that a push publishes."""
    names = "|".join(map(re.escape, (RUN_FILE, SCALARS, HISTOGRAMS, ALERTS)))
    return re.fullmatch(rf"{FOLDER}/({names}|{TABLES}/[\w.-]+\.jsonl|{IMAGES}/[\w.-]+\.png)", path) is not None


def left_by_earlier_push(there: set[str], prefix: str, read) -> set[str]:
    """Files of the dictionaries that a repo holds, as its index and configuration list them."""
    folders = set()
    if prefix + INDEX_NAME in there:
        with contextlib.suppress(TranscoderError):
            folders = {prefix + name for name in parse_index(read(prefix + INDEX_NAME), INDEX_NAME).values()}
    found = {prefix + INDEX_NAME, *(prefix + name for name in CODE_FILES)} & there if folders else set()
    if prefix + CONFIG_NAME in there:
        kind = parse_saved(read(prefix + CONFIG_NAME), f"{CONFIG_NAME} in the repo").get("model_type")
        if kind not in DICTIONARY_TYPES:
            raise TranscoderError(
                f"The repo holds a model of another kind ({kind}) at that path, which a push would overwrite: push to a "
                "separate repo, or give a `subfolder`."
            )
        folders.add(prefix.rstrip("/"))
    for path in there:
        parent, _, name = path.rpartition("/")
        if parent in folders and _DICTIONARY_FILE.fullmatch(name):
            found.add(path)
    return found


def _holds_token(content: bytes) -> bool:
    own = get_token()
    return re.search(rb"\bhf_[A-Za-z0-9]{30,}", content) is not None or bool(own and own.encode() in content)
