"""Commit, find, check and delete checkpoint folders."""

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ..errors import TranscoderError
from ..files import inner_path, remove_leftovers
from ..text import logging
from ..text.printable import printable
from ..text.strict_json import read_json, to_json


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.get_logger(__name__)

# Incremented when older versions can no longer continue checkpoints of this version.
FORMAT_VERSION = 2
MANIFEST = "checkpoint.json"
TRAINER_STATE, FACTS = "trainer_state.json", "fingerprint.json"
OPTIMIZER, SCHEDULER = "optimizer.safetensors", "scheduler.safetensors"
# Files that a run needs to continue exactly.
RESUMED_FILES = (FACTS, OPTIMIZER, SCHEDULER)
_PICKLES = (".bin", ".pickle", ".pkl", ".pt", ".pth")
PARTIAL = ".partial"
# A folder that is being deleted is renamed to its name between these two, because creating a second directory would fail on
# a full disk.
_REPLACED, _REMOVED = ".{}.replaced", ".{}.removed"


def last_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The usable checkpoint with the highest step in the folder of a run; `None` if there is none."""
    return next((path for path, reason in _judged(output_dir) if reason is None), None)


def find_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """
    Finds the checkpoint to resume from, with a warning for each unusable one that is skipped.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the run.

    Returns:
        `Path`, or `None` if the folder has no checkpoint at all.

    Raises:
        [`TranscoderError`]: there are checkpoints, but none can be used.
    """
    skipped = []
    for path, reason in _judged(output_dir):
        if reason is None:
            for name, why in skipped:
                logger.warning(f"{name} in {output_dir} cannot be used ({why}): {path.name} is used instead.")
            return path
        skipped.append((path.name, reason))
    if skipped:
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped)
        raise TranscoderError(
            f"No checkpoint in {output_dir} can be used ({reasons}): restore one from a copy, or remove them and start "
            "again."
        )
    return None


def why_unusable(checkpoint: str | os.PathLike) -> str | None:
    """
    Returns in a few words why a run cannot be continued from a folder; `None` if it can.

    Every file of the manifest must exist with the same SHA-256. Files that are not in the manifest are never read, and
    nothing is unpickled.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder of the checkpoint.
    """
    folder = Path(checkpoint)
    try:
        manifest = read_json(folder / MANIFEST)
        files, digests = manifest["files"], manifest["sha256"]
        if not files.keys() == digests.keys():
            return f"{MANIFEST} does not give every file's SHA-256"
        paths = {inner_path(name, MANIFEST): folder / name for name in files}
    except TranscoderError:
        return f"it has no readable {MANIFEST}, which is written last"
    except (KeyError, AttributeError):
        if manifest.get("format_version") == 1:
            return (
                "it was written by an early version of hf_transcoders, with a pickled optimizer and without checksums"
            )
        return f"{MANIFEST} is damaged"
    if manifest.get("format_version") != FORMAT_VERSION:
        return f"it has format {printable(manifest.get('format_version'))}, and this version reads {FORMAT_VERSION}"
    if TRAINER_STATE not in files:
        return f"it has no {TRAINER_STATE}"
    if missing := [name for name in RESUMED_FILES if name not in files]:
        return f"it holds the weights only, without {missing[0]}, as `save_only_model` asks for"
    for name, path in paths.items():
        if path.suffix in _PICKLES:
            return f"{printable(name)} is a pickle, which is never loaded"
        if not path.is_file():
            return f"{printable(name)} is missing"
        if path.stat().st_size != files[name]:
            return f"{printable(name)} has {path.stat().st_size} bytes instead of {printable(files[name])}"
    try:
        found = _sha256(paths)
    except OSError as error:
        return f"a file cannot be read: {error.strerror or error}"
    if damaged := [name for name in files if found[name] != digests[name]]:
        return f"{printable(damaged[0])} is damaged: its SHA-256 is not that of {MANIFEST}"
    return None


def checkpoint_folders(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints of dictionaries in the folder of a run, lowest step first, whether they can be used or not."""
    return [path for _, path in sorted(_numbered(output_dir)) if (path / MANIFEST).is_file()]


def commit(partial: Path, final: Path) -> None:
    """
    Renames a written folder to a checkpoint. An older checkpoint with that name is moved aside first, and [`recover`]
    moves it back if the process dies before the new one is in place.

    Args:
        partial (`Path`): Written folder, on the same file system.
        final (`Path`): Path of the checkpoint.
    """
    paths = {path.relative_to(partial).as_posix(): path for path in sorted(partial.rglob("*")) if path.is_file()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "files": {name: path.stat().st_size for name, path in paths.items()},
        "sha256": _sha256(paths),
    }
    (partial / MANIFEST).write_text(to_json(manifest) + "\n")
    # The name must not reach the disk before the bytes: after a power failure the files would be empty.
    for path in (*paths.values(), partial / MANIFEST, partial):
        _flush(path)
    replaced = final.with_name(_REPLACED.format(final.name))
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(partial, final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, keep: Collection[Path]) -> None:
    """
    Deletes the oldest checkpoints beyond a limit.

    Args:
        output_dir (`Path`): Folder of the run.
        limit (`int`, *optional*): Number of checkpoints to keep. `None` or 0 keeps all.
        keep (`Collection[Path]`): Checkpoints to keep in any case.
    """
    if not limit or limit < 0:
        return
    # Those of another trainer have no manifest. By age, because a run resumed from an earlier checkpoint writes lower steps after higher ones; by step for checkpoints
    # of the same age.
    paths = [
        path
        for *_, path in sorted(
            (int(path.stat().st_mtime), step, path)
            for step, path in _numbered(output_dir)
            if (path / MANIFEST).is_file()
        )
    ]
    kept = {path.name for path in keep}
    surplus = len(paths) - max(limit, len(kept))
    for path in [path for path in paths if path.name not in kept][: max(surplus, 0)]:
        # By a rename first: a partly deleted checkpoint must not look like one.
        removed = path.with_name(_REMOVED.format(path.name))
        shutil.rmtree(removed, ignore_errors=True)
        os.replace(path, removed)
        shutil.rmtree(removed, ignore_errors=True)


def recover(output_dir: str | os.PathLike) -> None:
    """
    Cleans up the leftovers of a killed run, with a warning for an interrupted save.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the run.
    """
    output_dir = Path(output_dir)
    before, after = _REPLACED.split("{}")
    for replaced in output_dir.glob(_REPLACED.format("checkpoint-*")):
        final = replaced.with_name(replaced.name.removeprefix(before).removesuffix(after))
        if not final.exists():
            os.replace(replaced, final)
    for partial in (output_dir / PARTIAL).glob("checkpoint-*"):
        step = partial.name.removeprefix("checkpoint-")
        logger.warning(f"A save of step {step} into {output_dir} was interrupted: its leftovers are removed.")
    leftovers = [output_dir / PARTIAL]
    for pattern in (_REPLACED, _REMOVED):
        leftovers += output_dir.glob(pattern.format("checkpoint-*"))
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    # A final `save_model` into a new folder writes its files next to it, see `atomic_directory`.
    remove_leftovers(output_dir.absolute().parent, output_dir.absolute().name)
    remove_leftovers(output_dir)


def make_run_folder(output_dir: str | os.PathLike) -> None:
    """Creates the folder of a run if it does not exist; raises a [`TranscoderError`] if it cannot be created."""
    try:
        os.makedirs(output_dir, exist_ok=True)
    except OSError as error:
        raise TranscoderError(
            f"{output_dir} cannot be created ({error.strerror or error}): give another `output_dir`."
        ) from error


@contextmanager
def only_run(output_dir: str | os.PathLike) -> Iterator[None]:
    """
    Refuses a second run in the same folder while the first is running. The operating system releases the lock however the
    process ends; on file systems without locks there is no check.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the run, created if it does not exist.
    """
    if fcntl is None:
        yield
        return
    make_run_folder(output_dir)
    folder = os.open(output_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TranscoderError(
                f"Another run is writing into {output_dir}: wait until it ends, or give another `output_dir`."
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(folder)


def _judged(output_dir) -> Iterator[tuple[Path, str | None]]:
    """The checkpoints of a folder, highest step first, each with the reason why it is unusable or `None`."""
    for _, path in sorted(_numbered(output_dir), reverse=True):
        yield path, why_unusable(path)


def _numbered(output_dir) -> list[tuple[int, Path]]:
    """Step and path of every folder with the name of a checkpoint."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    steps = [path.name.removeprefix("checkpoint-") for path in folders]
    return [(int(step), path) for step, path in zip(steps, folders, strict=True) if step.isdecimal()]


def _sha256(paths: Mapping[str, Path]) -> dict[str, str]:
    """Name -> digest of each file. Hashing releases Python's lock, so large files are hashed in parallel."""

    def digest(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(digest, paths.values()), strict=True))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
