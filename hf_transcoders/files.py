"""Atomic writes of files and folders, and consistent reads while other processes write."""

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

# A save into an existing folder is committed by one rename to this name inside the folder: from then on its files replace
# those of the folder, and the next process that reads or writes there moves them into place.
_SAVING = ".hf_transcoders.saving"
_SAVE = ".save.json"
# Moving files into place takes milliseconds, unless the disk hangs or the process is stopped.
_PATIENCE = 20.0
_ATTEMPTS = 200
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


# First characters of formulas in spreadsheets, full-width forms included, and blanks that they skip before one.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def cache_folder() -> Path:
    """Folder for converted models and collected texts: `$HF_TRANSCODERS_CACHE`, else `hf_transcoders` in `$HF_HOME`."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_TRANSCODERS_CACHE") or Path(HF_HOME, "hf_transcoders")).expanduser()


@contextmanager
def atomic_directory(
    target: str | os.PathLike,
    replacing: str | None = None,
    unchanged: Mapping[Path, tuple | None] | None = None,
    removing: Iterable[str] = (),
) -> Iterator[Path]:
    """
    Yields an empty folder whose files appear in `target` when the block ends without an exception.

    All files appear at once: a new `target` by one rename, and the files in an existing one together, for readers that use
    [`read_settled`] and whenever the process dies. Other files in `target` are kept, except those that match `replacing`.
    Leftovers of dead processes are removed.

    Args:
        target (`str` or `os.PathLike`): Folder to write.
        replacing (`str`, *optional*):
            Pattern of file names, such as `"model*.safetensors*"`. In each folder that receives files with such names, older
            ones are deleted after the new ones are in place.
        unchanged (`Mapping[Path, tuple]`, *optional*):
            Files in `target` that the new ones were made from -> their [`signature`] at that time. If one of them has
            changed since, nothing is written.
        removing (`Iterable[str]`, *optional*):
            Paths of files in `target` that are deleted after the new ones are in place, unless they are among them. Folders
            that become empty are removed.

    Raises:
        [`OSTranscoderError`]: the files cannot be written. `target` is then as before.
    """
    target = Path(target)
    with _as_sentence(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # Inside an existing folder, because its parent may be on another disk, or not writable.
        with _partial_folder(target if target.is_dir() else target.parent, target.name) as partial:
            partial.chmod(0o777 & ~_umask())
            yield partial
            for path in partial.rglob("*"):
                # Safetensors writes files that only their owner can read.
                if path.is_file():
                    path.chmod(0o666 & ~_umask())
            _commit(partial, target, replacing, unchanged or {}, list(removing))


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
    """Writes a text file atomically, in UTF-8, and returns its path."""
    with atomic_file(target) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(target)


def read_settled(
    folder: str | os.PathLike, read: Callable[[Callable[[Path], Path]], Result], inside: int = 1
) -> Result:
    """
    Reads several files of a folder so that all of them are of one save, even if other processes save there meanwhile.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of the files. An interrupted save of a dead process is finished first.
        read (`Callable`):
            Function that opens or reads the files and returns the result. Its argument is a function to call with each
            path before it is opened. It is called again if a save came in between.
        inside (`int`, *optional*, defaults to 1):
            Number of levels above `folder` at which a folder may have been saved as a whole, such as that of a set.

    Returns:
        The result of `read`.

    Raises:
        [`TranscoderError`]: other processes keep saving into the folder.
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
    raise TranscoderError(f"{printable(folder)} keeps being saved into by other processes: read it again later.")


def remove_leftovers(folder: str | os.PathLike, name: str | None = None) -> None:
    """
    Removes the partial files of dead processes from a folder; those of running processes are kept.

    Args:
        folder (`str` or `os.PathLike`): Folder to clean up.
        name (`str`, *optional*): Name of a file or folder; only its partial files are removed.
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
    """Writes a table as a CSV file atomically, in UTF-8.

        Args:
            target (`str` or `os.PathLike`): Path of the file.
            head (`Sequence[object]`): Names of the columns.
            rows (`Iterable[Sequence[object]]`):
                Cells of each row; `None` is an empty cell. Text that a spreadsheet would take for a formula is prefixed with an
    apostrophe.

            Returns:
            `Path`: path of the file.
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
    """Checks a path in the content of a file, such as the folder of a dictionary or a shard of its weights.

    Args:
        name (`object`): Value in the file.
        source (`str`): Path of the file, for the message.

    Returns:
        `str`: `name`, a relative path of plain names joined by `/` that stays inside the folder.

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
            f"{printable(source)} names the path '{printable(name)[:100]}', but its paths must stay in its own "
            "folder: names joined by '/', without '..'."
        )
    return name


def is_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """
    Whether a file or folder is inside a folder after following all symbolic links.

    Args:
        path (`str` or `os.PathLike`): Path of the file or folder.
        folder (`str` or `os.PathLike`):
        Containing folder. The blobs of a repo count as inside a snapshot of it in the Hub's cache.
    """
    root = Path(folder).resolve()
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        root = root.parent.parent
    return Path(path).resolve().is_relative_to(root)


# ---------------------------------------------------------------------------------------------------- writing


@contextmanager
def _as_sentence(target: Path) -> Iterator[None]:
    """Turns errors of writing `target` into one sentence with the reason."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSTranscoderError):
            if error.__cause__ is None:
                raise
            # The error of a file inside `target`.
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
    """The error number of the operating system, if known, and its message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror or os.strerror(error.errno)
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    # Errors of safetensors have the number in their text.
    found = re.search(r"([^:]*) \(os error (\d+)\)", text)
    return (int(found[2]), found[1].strip()) if found else (None, text.rstrip("."))


@contextmanager
def _partial_folder(place: Path, name: str) -> Iterator[Path]:
    """A new folder in `place` for the partial files of `name`, locked while this process writes to it."""
    remove_leftovers(place, name)
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=place))
        try:
            descriptor = _lock(partial)
        except (FileNotFoundError, BlockingIOError):  # Another process removed it as a leftover.
            continue
        break
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _commit(
    partial: Path,
    target: Path,
    replacing: str | None,
    unchanged: Mapping[Path, tuple | None],
    removing: Sequence[str],
) -> None:
    """Moves the files in `partial` into `target`."""
    if not target.exists():
        try:
            partial.rename(target)
            return
        except OSError:
            if not target.is_dir():  # Otherwise another process created it meanwhile.
                raise
    written = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
    # Steps that can fail come before the first change.
    for name in written:
        path = target / name
        if blocking := [part for part in path.parents if part.exists() and not part.is_dir()]:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(blocking[0]))
        if not is_inside(path.parent, target):
            raise OSTranscoderError(
                f"{printable(path.parent)} is a link that leads out of {printable(target)}, so nothing is written through "
                "it: remove the link, or choose another folder."
            )
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    save = {"written": written, "replacing": replacing, "removing": sorted(set(removing) - set(written))}
    (partial / _SAVE).write_text(json.dumps(save), encoding="utf-8")
    while True:
        _finish_save(target)
        try:
            partial.rename(target / _SAVING)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    # The lock moves with the folder, and no other process can save there until its files are moved.
    if changed := [path for path, before in unchanged.items() if signature(path) != before]:
        (target / _SAVING).rename(partial)
        raise OSTranscoderError(
            f"{printable(changed[0])} was saved again meanwhile, so nothing was written: do it again."
        )
    _move_into_place(target)


def _finish_save(target: Path) -> None:
    """Waits until a committed save into `target` is moved into place, or finishes it if its process has died."""
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
                    f"A save into {printable(target)} does not finish: wait for the process that saves there, or end it."
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
    """Moves the files of a committed save into place. It can be interrupted at any point and repeated."""
    saving = target / _SAVING
    if not (saving / _SAVE).exists() and any(path.is_file() for path in saving.rglob("*")):
        raise TranscoderError(f"{printable(saving)} is not from an interrupted save: move it somewhere else.")
    if (saving / _SAVE).exists():
        written, replacing, removing = _read_save(saving / _SAVE)
        for name in written:
            # The folder may come from somewhere else: nothing is moved through a link.
            if not is_inside((saving / name).parent, saving) or not is_inside((target / name).parent, target):
                raise TranscoderError(
                    f"{printable(saving)} holds links that lead out of it: remove it, or get the folder from another source."
                )
            if (saving / name).exists():
                os.makedirs((target / name).parent, exist_ok=True)
                os.replace(saving / name, target / name)
        matching = [name for name in written if replacing and fnmatch.fnmatchcase(Path(name).name, replacing)]
        for folder in {(target / name).parent for name in matching}:
            for path in list(folder.iterdir()):
                stale = (
                    fnmatch.fnmatchcase(path.name, replacing) and path.relative_to(target).as_posix() not in written
                )
                if stale and not path.is_dir():
                    path.unlink()
        _remove_files(target, removing)
    shutil.rmtree(saving)


def _remove_files(folder: Path, names: Iterable[str]) -> None:
    """Deletes files inside a folder, and the folders inside it that become empty."""
    for name in names:
        path = folder / name
        # The folder may come from somewhere else: nothing is deleted through a link.
        if not is_inside(path.parent, folder) or path.is_dir():
            continue
        path.unlink(missing_ok=True)
        for parent in path.parents[: len(Path(name).parts) - 1]:
            try:
                parent.rmdir()
            except OSError:  # It holds other files, or is gone.
                break


def _read_save(path: Path) -> tuple[list[str], str | None, list[str]]:
    """The files of a committed save, the pattern of names that it replaces, and the files that it removes."""
    save = read_json(path)
    written, replacing, removing = save.get("written"), save.get("replacing"), save.get("removing", [])
    if not isinstance(written, list) or not isinstance(replacing, str | None) or not isinstance(removing, list):
        raise TranscoderError(f"{printable(path)} is damaged: remove the folder that it lies in, and save again.")
    inner = [[inner_path(name, str(path)) for name in names] for names in (written, removing)]
    return inner[0], replacing, inner[1]


def _lock(path: str | os.PathLike) -> int | None:
    """
    Locks a file or folder until the descriptor is closed or the process ends.

    Returns:
        `int`: descriptor, or `None` where the file system or the operating system has no such locks.

    Raises:
        `FileNotFoundError`: the path does not exist, or no longer.
        `BlockingIOError`: another process has the lock.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The process that had the lock before may have removed or renamed the file.
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
    """Identity of the file at a path, which changes when the file is replaced or written; `None` if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
