"""Folders and files that are either whole or absent, and reading them while others write."""

import csv
import errno
import fnmatch
import glob
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from .errors import OSTranscoderError, TranscoderError
from .text.printable import printable
from .text.strict_json import read_json


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Result = TypeVar("Result")

# A save into an existing folder is decided by one rename to this name inside the folder: from then on what it holds
# counts in place of the folder's own files, and whoever comes by next moves it to its place.
_SAVING = ".hf_transcoders.saving"
_SAVE = ".save.json"
# Moving files into place takes milliseconds, unless their disk hangs or their process is stopped.
_PATIENCE = 20.0
_ATTEMPTS = 200
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


# What spreadsheets take for the start of a formula, the full-width forms included, and what they skip before one.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def cache_folder() -> Path:
    """Where converted models and collected texts are kept: `$HF_TRANSCODERS_CACHE`, else `hf_transcoders` in `$HF_HOME`."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_TRANSCODERS_CACHE") or Path(HF_HOME, "hf_transcoders")).expanduser()


@contextmanager
def atomic_directory(
    target: str | os.PathLike, replacing: str | None = None, unchanged: Mapping[Path, tuple | None] | None = None
) -> Iterator[Path]:
    """
    Yields an empty folder; what is written there appears in `target` only when the block ends without an exception.

    All of it appears at once: a new `target` by one rename, and in an existing one all files together, for readers that
    use [`read_settled`] and whenever the process dies. Files that the block did not write stay, except those named by
    `replacing`. What a process that died has left is removed.

    Args:
        target (`str` or `os.PathLike`): The folder to fill.
        replacing (`str`, *optional*):
            Pattern of names, such as `"model*.safetensors*"`. In each folder that receives files, older files of such a
            name go once the new ones are in place.
        unchanged (`Mapping[Path, tuple]`, *optional*):
            Files of an existing `target` that the new ones were made from, each with its [`signature`] at that time. Where
            one has changed since, nothing is written.

    Raises:
        [`OSTranscoderError`]: the files cannot be written. `target` is then as before.
    """
    target = Path(target)
    with _as_sentence(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # Inside an existing folder, because its parent may be on another disk, or belong to somebody else.
        with _partial_folder(target if target.is_dir() else target.parent, target.name) as partial:
            partial.chmod(0o777 & ~_umask())
            yield partial
            for path in partial.rglob("*"):
                # Safetensors writes files that nobody but their owner can read.
                if path.is_file():
                    path.chmod(0o666 & ~_umask())
            _commit(partial, target, replacing, unchanged or {})


@contextmanager
def atomic_file(target: str | os.PathLike) -> Iterator[Path]:
    """Yields a path that is renamed to `target` when the block ends without an exception."""
    target = Path(target)
    with _as_sentence(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _partial_folder(target.parent, target.name) as partial:
            yield partial / target.name
            os.replace(partial / target.name, target)


def write_text(target: str | os.PathLike, text: str) -> Path:
    """Writes a text as a file that is whole at any moment, in UTF-8, and gives its path."""
    with atomic_file(target) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(target)


def read_settled(
    folder: str | os.PathLike, read: Callable[[Callable[[Path], Path]], Result], inside: int = 1
) -> Result:
    """
    Read several files of a folder such that all of them come from one save, whoever saves there meanwhile.

    Args:
        folder (`str` or `os.PathLike`):
            Where the files lie. A save that a dead process has left half-way is finished first.
        read (`Callable`):
            Opens or reads the files and returns what came of it. It gets a function that is to be called with each path
            before it is opened, and is called again where a save came in between.
        inside (`int`, *optional*, defaults to 1):
            How far above `folder` the one can lie that was saved as a whole, such as that of a set.

    Returns:
        What `read` returns.

    Raises:
        [`TranscoderError`]: the folder is saved into over and over.
    """
    folder = Path(folder).absolute()
    places = [folder, *folder.parents][inside::-1]
    for _ in range(_ATTEMPTS):
        for place in places:
            _finish_save(place)
        seen: dict[Path, tuple | None] = {}

        def opening(path, seen=seen):
            seen.setdefault(Path(path), signature(path))
            return path

        failure = result = None
        try:
            result = read(opening)
        except Exception as error:
            failure = error
        saving = any((place / _SAVING).exists() for place in places)
        if not saving and all(signature(path) == before for path, before in seen.items()):
            if failure is not None:
                raise failure
            return result
    raise TranscoderError(f"{printable(folder)} is being saved into over and over: read it again later.")


def remove_leftovers(folder: str | os.PathLike, name: str | None = None) -> None:
    """
    Remove what processes that died while they wrote into a folder have left there; that of living ones stays.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        name (`str`, *optional*): Only what was to become the file or folder of this name.
    """
    for path in Path(folder).glob(f".{'*' if name is None else glob.escape(name)}.*.partial"):
        try:
            descriptor = _lock(path)
        except OSError:  # It is locked, or gone.
            continue
        if descriptor is None:
            continue
        try:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


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


def is_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """
    Whether a file or folder lies in a folder when all symbolic links are followed.

    Args:
        path (`str` or `os.PathLike`): The file or folder.
        folder (`str` or `os.PathLike`): The folder. In a snapshot of the Hub's cache, the files of its repo count as inside.
    """
    root = Path(folder).resolve()
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        root = root.parent.parent
    return Path(path).resolve().is_relative_to(root)


# ---------------------------------------------------------------------------------------------------- writing


@contextmanager
def _as_sentence(target: Path) -> Iterator[None]:
    """Says in one sentence that `target` cannot be written, and why."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSTranscoderError):
            if error.__cause__ is None:
                raise
            # Of a file that was to become a part of this one.
            error = error.__cause__
        number, reason = _system_error(error)
        if number in _NO_ROOM:
            advice = "make room, then save again"
        elif number in _NOT_ALLOWED:
            advice = "choose a folder that you may write to"
        else:
            advice = "choose another place, or fix this one"
        failure = OSTranscoderError(f"{printable(target)} could not be written ({printable(reason)}): {advice}.")
        failure.errno, failure.strerror = number, reason
        raise failure from error


def _system_error(error: Exception) -> tuple[int | None, str]:
    """The number that the operating system gave to what failed, where it is known, and its words for it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror or os.strerror(error.errno)
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    # Safetensors has the number in its text.
    found = re.search(r"([^:]*) \(os error (\d+)\)", text)
    return (int(found[2]), found[1].strip()) if found else (None, text.rstrip("."))


@contextmanager
def _partial_folder(place: Path, name: str) -> Iterator[Path]:
    """A new folder in `place` for what shall become `name`, locked as long as this process works on it."""
    remove_leftovers(place, name)
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=place))
        try:
            descriptor = _lock(partial)
        except (FileNotFoundError, BlockingIOError):  # Somebody who tidies up was faster.
            continue
        break
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _commit(partial: Path, target: Path, replacing: str | None, unchanged: Mapping[Path, tuple | None]) -> None:
    """Gives what lies in `partial` its place in `target`."""
    if not target.exists():
        try:
            partial.rename(target)
            return
        except OSError:
            if not target.is_dir():  # Else somebody made it meanwhile.
                raise
    written = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
    # What can fail is done before anything changes.
    for name in written:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_inside(path.parent, target):
            raise OSTranscoderError(
                f"{printable(path.parent)} is a link that leads out of {printable(target)}, so nothing is written through "
                "it: remove the link, or choose another folder."
            )
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    (partial / _SAVE).write_text(json.dumps({"written": written, "replacing": replacing}), encoding="utf-8")
    while True:
        _finish_save(target)
        try:
            partial.rename(target / _SAVING)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    # The lock on the folder goes with it, and nobody else can save there until its files are moved.
    if changed := [path for path, before in unchanged.items() if signature(path) != before]:
        (target / _SAVING).rename(partial)
        raise OSTranscoderError(
            f"{printable(changed[0])} was saved anew meanwhile, so nothing was written: do it again."
        )
    _move_into_place(target)


def _finish_save(target: Path) -> None:
    """Waits for a save into `target` that is being moved into place; if its process has died, does the rest."""
    saving = target / _SAVING
    patience = time.monotonic() + _PATIENCE
    while saving.is_dir():
        try:
            descriptor = _lock(saving)
        except FileNotFoundError:
            continue
        except OSError as error:
            if time.monotonic() > patience:
                raise TranscoderError(
                    f"A save into {printable(target)} is not getting on: wait for the process that saves there, or end it."
                ) from error
            time.sleep(0.001)
            continue
        try:
            if descriptor is not None or time.monotonic() > patience:
                with _as_sentence(target):
                    _move_into_place(target)
        finally:
            if descriptor is not None:
                os.close(descriptor)
            else:
                time.sleep(0.001)


def _move_into_place(target: Path) -> None:
    """Moves the files of a decided save to their places. It can break off anywhere and be done again from the start."""
    saving = target / _SAVING
    if not (saving / _SAVE).exists() and any(path.is_file() for path in saving.rglob("*")):
        raise TranscoderError(f"{printable(saving)} is not of a save that was interrupted: move it somewhere else.")
    if (saving / _SAVE).exists():
        written, replacing = _read_save(saving / _SAVE)
        for name in written:
            # The folder may be a stranger's: nothing is moved from or to where a link leads.
            if not is_inside((saving / name).parent, saving) or not is_inside((target / name).parent, target):
                raise TranscoderError(
                    f"{printable(saving)} holds links that lead out of it: remove it, or get the folder from elsewhere."
                )
            if (saving / name).exists():
                os.makedirs((target / name).parent, exist_ok=True)
                os.replace(saving / name, target / name)
        for folder in {(target / name).parent for name in written} if replacing is not None else ():
            for path in list(folder.iterdir()):
                stale = (
                    fnmatch.fnmatchcase(path.name, replacing) and path.relative_to(target).as_posix() not in written
                )
                if stale and not path.is_dir():
                    path.unlink()
    shutil.rmtree(saving)


def _read_save(path: Path) -> tuple[list[str], str | None]:
    """Which files a decided save has, and the pattern of the names that it replaces."""
    save = read_json(path)
    written, replacing = save.get("written"), save.get("replacing")
    if not isinstance(written, list) or not isinstance(replacing, str | None):
        raise TranscoderError(f"{printable(path)} is damaged: remove the folder that it lies in, and save again.")
    return [inner_path(name, str(path)) for name in written], replacing


def _lock(path: str | os.PathLike) -> int | None:
    """
    Locks a file or folder until the descriptor is closed or the process ends, whichever way.

    Returns:
        `int`: the descriptor, or `None` where the file system or the operating system knows no such locks.

    Raises:
        `FileNotFoundError`: there is nothing of that name, or no longer.
        `BlockingIOError`: somebody else has it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had the lock before may have removed or renamed what was behind the name.
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def signature(path: str | os.PathLike) -> tuple | None:
    """What tells a file from every other that had or will have its name; `None` where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
