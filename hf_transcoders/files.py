"""Folders that are either whole or absent."""

import csv
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import TranscoderError
from .text.printable import printable


# What spreadsheets take for the start of a formula, the full-width forms included, and what they skip before one.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def cache_folder() -> Path:
    """Where converted models and collected texts are kept: `$HF_TRANSCODERS_CACHE`, else `hf_transcoders` in `$HF_HOME`."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_TRANSCODERS_CACHE") or Path(HF_HOME, "hf_transcoders")).expanduser()


@contextmanager
def atomic_directory(target: str | os.PathLike, replacing: str | None = None) -> Iterator[Path]:
    """
    Yields an empty folder; what is written there appears in `target` only when the block ends without an exception.

    A new `target` appears by one rename. Into an existing one the files move one by one, each by a rename, so that every
    file in it is whole at any moment; files that the block did not write stay, except those named by `replacing`.

    Args:
        target (`str` or `os.PathLike`): The folder to fill.
        replacing (`str`, *optional*):
            Pattern of names, such as `"model*.safetensors*"`. In each folder that receives files, older files of such a
            name go once the new ones are in place.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    partial.chmod(0o777 & ~_umask())
    try:
        yield partial
        for path in partial.rglob("*"):
            # Safetensors writes files that nobody but their owner can read.
            if path.is_file():
                path.chmod(0o666 & ~_umask())
        if not target.exists():
            partial.rename(target)
        else:
            written = {path.relative_to(partial) for path in partial.rglob("*") if path.is_file()}
            for path in sorted(written):
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial / path, target / path)
            if replacing is not None:
                for folder in {path.parent for path in written}:
                    for stale in (target / folder).glob(replacing):
                        if stale.relative_to(target) not in written:
                            stale.unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(target: str | os.PathLike) -> Iterator[Path]:
    """Yields a path in the folder of `target` that is renamed to `target` when the block ends without an exception."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(target: str | os.PathLike, text: str) -> Path:
    """Writes a text as a file that is whole at any moment, in UTF-8, and gives its path."""
    with atomic_file(target) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(target)


def write_csv(target: str | os.PathLike, head: Sequence[object], rows: Iterable[Sequence[object]]) -> Path:
    """Writes a table as a CSV file that is whole at any moment, in UTF-8.

    Args:
        target (`str` or `os.PathLike`): The file.
        head (`Sequence[object]`): Names of the columns.
        rows (`Iterable[Sequence[object]]`):
            Cells; `None` is an empty one. Text that a spreadsheet would take for a formula gets an apostrophe in front.

    Returns:
        `Path`: the file.
    """
    with atomic_file(target) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for row in (head, *rows):
            writer.writerow([_cell(value) for value in row])
    return Path(target)


def _cell(value):
    """A cell that is a number or text, but not a formula."""
    if value is None or isinstance(value, bool | int | float):
        return "" if value is None else value
    text = str(value)
    if not text.startswith(_FORMULA_STARTS):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def inner_path(name: object, source: str) -> str:
    """Check a path that a file names, such as the sub-folder of a dictionary or a shard of its weights.

    Args:
        name (`object`): What the file says.
        source (`str`): The file that says it, for the message.

    Returns:
        `str`: `name`, a relative path of plain names joined by `/`, which leads nowhere but into the folder.

    Raises:
        [`TranscoderError`]: the path is absolute, empty, leads outside, or is not portable.
    """
    if not isinstance(name, str):
        raise TranscoderError(
            f"{printable(source)} names a {type(name).__name__} where it must name a path in its own folder."
        )
    plain = name and "\\" not in name and ":" not in name and name.isprintable()
    if not plain or len(name) > 1024 or any(part in ("", ".", "..") for part in name.split("/")):
        raise TranscoderError(
            f"{printable(source)} names the path '{printable(name)[:100]}', but a path in it must lead to a place in its own "
            "folder: names joined by '/', without '..'."
        )
    return name


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
