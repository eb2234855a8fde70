"""Checkpoint folders: written whole, found only while usable, and removed in one move."""

import json
import os
import shutil
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import TranscoderError
from ..text import logging


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.get_logger(__name__)

MANIFEST = "checkpoint.json"
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

    Every file that was there when the checkpoint was written must be there in its full size, and be what its name says:
    JSON, safetensors whose header fits the file, or a torch archive with its table of contents. Nothing is unpickled.

    Args:
        checkpoint (`str` or `os.PathLike`): The folder.
    """
    folder = Path(checkpoint)
    try:
        files = dict(json.loads((folder / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no readable {MANIFEST}, which is written last"
    if "trainer_state.json" not in files:
        return "it has no trainer_state.json"
    if "scheduler.pt" not in files:
        return "it holds the weights only, as `save_only_model` asks for"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                zipfile.ZipFile(path).close()
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{name} is damaged: {error}"
    return None


def commit(partial: Path, final: Path) -> None:
    """
    Gives a written folder its name as a checkpoint. At any moment one of the two is in place: an older checkpoint of that
    name is moved aside first, and [`recover`] moves it back where the process died before the new one was in place.

    Args:
        partial (`Path`): The folder, on the same file system.
        final (`Path`): Its name from now on.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
    (partial / MANIFEST).write_text(json.dumps({"format_version": 1, "files": sizes}, indent=2) + "\n")
    # A name must not reach the disk before the bytes: after a power failure the files would be empty.
    for path in (*files, partial / MANIFEST, partial):
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
    # A final `save_model` makes its files beside the folder, see `atomic_directory`.
    leftovers += output_dir.absolute().parent.glob(f".{output_dir.absolute().name}.*.partial")
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    for path in output_dir.glob(".*.partial"):
        path.unlink(missing_ok=True)


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
    os.makedirs(output_dir, exist_ok=True)
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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
