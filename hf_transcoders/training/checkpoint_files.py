"""Checkpoint folders: written whole, found only while usable, and removed in one move."""

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

# Raised when a checkpoint written by this version can no longer be continued by an older one.
FORMAT_VERSION = 2
MANIFEST = "checkpoint.json"
TRAINER_STATE, FACTS = "trainer_state.json", "fingerprint.json"
OPTIMIZER, SCHEDULER = "optimizer.safetensors", "scheduler.safetensors"
# Without these a run cannot go on exactly.
RESUMED_FILES = (FACTS, OPTIMIZER, SCHEDULER)
_PICKLES = (".bin", ".pickle", ".pkl", ".pt", ".pth")
PARTIAL = ".partial"
# A folder that is on its way out keeps its name between these two, so that no second directory has to be made for it:
# on a full disk that would fail.
_REPLACED, _REMOVED = ".{}.replaced", ".{}.removed"


def last_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The usable checkpoint of the highest step in a run's folder; `None` where there is none."""
    return next((path for path, reason in _judged(output_dir) if reason is None), None)


def find_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """
    The checkpoint to resume from: as [`last_checkpoint`], but it says which ones it has passed over.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder.

    Returns:
        `Path`, or `None` where the folder has no checkpoint at all.

    Raises:
        [`TranscoderError`]: There are checkpoints, and none can be used.
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
            "anew."
        )
    return None


def why_unusable(checkpoint: str | os.PathLike) -> str | None:
    """
    Why a run cannot be continued from a folder, in a few words; `None` if it can.

    Every file that was there when the checkpoint was written must be there with the same bytes, by its SHA-256. Files that
    the manifest does not name are never read, and nothing is unpickled.

    Args:
        checkpoint (`str` or `os.PathLike`): The folder.
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


def commit(partial: Path, final: Path) -> None:
    """
    Gives a written folder its name as a checkpoint. At any moment one of the two is in place: an older checkpoint of that
    name is moved aside first, and [`recover`] moves it back where the process died before the new one was in place.

    Args:
        partial (`Path`): The folder, on the same file system.
        final (`Path`): Its name from now on.
    """
    paths = {path.relative_to(partial).as_posix(): path for path in sorted(partial.rglob("*")) if path.is_file()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "files": {name: path.stat().st_size for name, path in paths.items()},
        "sha256": _sha256(paths),
    }
    (partial / MANIFEST).write_text(to_json(manifest) + "\n")
    # A name must not reach the disk before the bytes: after a power failure the files would be empty.
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
    Removes the oldest checkpoints beyond `limit`.

    Args:
        output_dir (`Path`): The run's folder.
        limit (`int`, *optional*): How many stay. `None` or 0: all.
        keep (`Collection[Path]`): Those that stay in any case.
    """
    if not limit or limit < 0:
        return
    # By age, because a run that went back to an earlier checkpoint writes lower steps after higher ones. Within a second,
    # and where all files claim one time, by step.
    paths = [
        path for *_, path in sorted((int(path.stat().st_mtime), step, path) for step, path in _numbered(output_dir))
    ]
    kept = {path.name for path in keep}
    surplus = len(paths) - max(limit, len(kept))
    for path in [path for path in paths if path.name not in kept][: max(surplus, 0)]:
        # In one move: half a checkpoint must not look like one.
        removed = path.with_name(_REMOVED.format(path.name))
        shutil.rmtree(removed, ignore_errors=True)
        os.replace(path, removed)
        shutil.rmtree(removed, ignore_errors=True)


def recover(output_dir: str | os.PathLike) -> None:
    """
    Tidies up what a killed run has left in its folder, and says which save was interrupted.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder.
    """
    output_dir = Path(output_dir)
    before, after = _REPLACED.split("{}")
    for replaced in output_dir.glob(_REPLACED.format("checkpoint-*")):
        final = replaced.with_name(replaced.name.removeprefix(before).removesuffix(after))
        if not final.exists():
            os.replace(replaced, final)
    for partial in (output_dir / PARTIAL).glob("checkpoint-*"):
        step = partial.name.removeprefix("checkpoint-")
        logger.warning(f"A save of step {step} into {output_dir} was interrupted: what it left is removed.")
    leftovers = [output_dir / PARTIAL]
    for pattern in (_REPLACED, _REMOVED):
        leftovers += output_dir.glob(pattern.format("checkpoint-*"))
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    # A final `save_model` into a new folder makes its files beside it, see `atomic_directory`.
    remove_leftovers(output_dir.absolute().parent, output_dir.absolute().name)
    remove_leftovers(output_dir)


def make_run_folder(output_dir: str | os.PathLike) -> None:
    """Makes the folder of a run where it is missing; raises [`TranscoderError`] where it cannot be made."""
    try:
        os.makedirs(output_dir, exist_ok=True)
    except OSError as error:
        raise TranscoderError(
            f"{output_dir} cannot be made ({error.strerror or error}): give another `output_dir`."
        ) from error


@contextmanager
def only_run(output_dir: str | os.PathLike) -> Iterator[None]:
    """
    Refuses a second run into the same folder while the first lives. The lock is the operating system's and leaves
    nothing behind, whichever way the process ends; file systems that know no locks do without.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder; it is made where it is missing.
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
                f"Another run is writing into {output_dir}: wait for its end, or give another `output_dir`."
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(folder)


def _judged(output_dir) -> Iterator[tuple[Path, str | None]]:
    """The checkpoints of a folder, the highest step first, each with what is wrong with it."""
    for _, path in sorted(_numbered(output_dir), reverse=True):
        yield path, why_unusable(path)


def _numbered(output_dir) -> list[tuple[int, Path]]:
    """Step and path of every folder that is named as a checkpoint."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    steps = [path.name.removeprefix("checkpoint-") for path in folders]
    return [(int(step), path) for step, path in zip(steps, folders, strict=True) if step.isdecimal()]


def _sha256(paths: Mapping[str, Path]) -> dict[str, str]:
    """Name -> digest of a file. Hashing leaves Python's lock, so that large files share the processors."""

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
