"""Which files a push has: those of the dictionaries, what training says of them, the run's records."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from huggingface_hub import get_token

from ..errors import TranscoderError
from ..models.transcoder_set import INDEX_NAME
from ..text import logging
from ..tracking import Run
from .remote_code import CODE_FILES, write_code_files, write_remote_code


logger = logging.get_logger(__name__)

# Files of one dictionary, as `save_pretrained` names them.
_DICTIONARY_FILE = re.compile(
    r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|"
    + "|".join(map(re.escape, CODE_FILES))
)
# What training leaves beside them that others can use.
_FACTS = ("evaluation.json", "training_args.json")


def dictionary_files(folder: str | os.PathLike) -> dict[str, Path]:
    """
    The files of the dictionary or set that lies in a folder, and what training says of it.

    Returns:
        `dict[str, Path]`: Path inside the folder, with `/` -> file.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).is_file():
        inside = [Path(name) for name in _subfolders((folder / INDEX_NAME).read_text(encoding="utf-8"))]
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
    return {path.as_posix(): folder / path for path in found if (folder / path).is_file()}


@contextlib.contextmanager
def with_remote_code(folder: str | os.PathLike) -> Iterator[Path]:
    """A copy of what lies in a folder, with the model's code."""
    with tempfile.TemporaryDirectory() as copy:
        files = dictionary_files(folder)
        for name, path in files.items():
            link_or_copy(path, Path(copy, name))
        for name in files:
            if PurePosixPath(name).name == "config.json":
                write_remote_code(Path(copy, name).parent)
        write_code_files(copy)
        yield Path(copy)


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file that will not be written over a second name; where the disk cannot do that, copies it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def run_records(run: Run | None, largest: int = 10 * 2**20) -> dict[str, Path]:
    """
    What others can use of a run's records: facts, curves, histograms, tables and pictures.

    Args:
        run ([`Run`], *optional*): The run.
        largest (`int`, *optional*, defaults to 10 MiB): Bytes above which a file stays here.

    Returns:
        `dict[str, Path]`: Path in the repo -> file. A file that seems to hold an access token is left out.
    """
    if run is None or run.folder is None:
        return {}
    found = {}
    for path in sorted((run.folder / "tracking").rglob("*")):
        name = path.relative_to(run.folder).as_posix()
        if not is_record(name) or not path.is_file() or path.stat().st_size > largest:
            continue
        if _holds_token(path.read_bytes()):
            logger.warning(f"{path} holds what looks like an access token and is not pushed.")
            continue
        found[name] = path
    return found


def is_record(path: str) -> bool:
    """Whether a path in a repo is that of such a record."""
    return (
        re.fullmatch(r"tracking/(run\.json|[\w.-]+\.jsonl|tables/[\w.-]+\.jsonl|images/[\w.-]+\.png)", path)
        is not None
    )


def left_by_earlier_push(there: set[str], prefix: str, read) -> set[str]:
    """The repo's files that belong to dictionaries there, as its own index and configuration name them."""
    folders = set()
    if prefix + INDEX_NAME in there:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            folders = {prefix + name for name in _subfolders(read(prefix + INDEX_NAME))}
    found = {prefix + INDEX_NAME, *(prefix + name for name in CODE_FILES)} & there if folders else set()
    if prefix + "config.json" in there:
        kind = json.loads(read(prefix + "config.json")).get("model_type")
        if kind != "transcoder":
            raise TranscoderError(
                f"The repo holds a model of another kind ({kind}) at that place, which a push would overwrite: push to a "
                "repo of its own, or give a `subfolder`."
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


def _subfolders(index: str) -> list[str]:
    return [entry["subfolder"] for entry in json.loads(index)["dictionaries"].values()]
