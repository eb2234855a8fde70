"""Find local text files, their kinds and their splits."""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import TranscoderError
from ..text import logging
from ..text.printable import printable


logger = logging.get_logger(__name__)

#: Suffix -> reader of `datasets`.
KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
# Names of files and folders -> split, as in `datasets`.
_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "dev": "validation",
    "val": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")
# Size of the start of a compressed file that is checked, and its largest compression ratio: prose shrinks to a third, logs
# to a fiftieth.
_COMPRESSED_BYTES, _EXPANDED_BYTES, _LARGEST_RATIO = 1 << 18, 1 << 25, 200
_START_BYTES = 1 << 16


def kind_of(path: str | os.PathLike) -> str | None:
    """The kind of a file by its name, in any case, compressed or not; `None` for other files."""
    name = os.path.basename(os.fspath(path)).lower()
    stem, suffix = os.path.splitext(name)
    if suffix in _COMPRESSIONS:
        kind = KINDS.get(os.path.splitext(stem)[1])
        return None if kind == "parquet" else kind
    return KINDS.get(suffix)


def files_of_folder(folder: Path) -> tuple[str, dict[str, list[str]]]:
    """
    Finds the text files of a folder, except hidden ones.

    Returns:
        `tuple[str, dict[str, list[str]]]`: the most common kind, and split -> files. Names such as `test.txt` or
        `validation/part.txt` determine the split; without such names all files belong to `train`.

    Raises:
        [`TranscoderError`]: there are no text files, or two kinds are equally common.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        if not hidden and (kind := kind_of(path)) and path.is_file():
            found.setdefault(kind, []).append(path)
    if not found:
        raise TranscoderError(f"The folder '{folder}' holds no {suffixes()} file: name a folder that does.")
    ranked = Counter({kind: len(paths) for kind, paths in found.items()}).most_common()
    counts = ", ".join(f"{count} {kind}" for kind, count in ranked)
    if len(ranked) > 1:
        if ranked[0][1] == ranked[1][1]:
            raise TranscoderError(
                f"The folder '{folder}' holds files of several kinds ({counts}): name the files, such as '{folder}/*.txt'."
            )
        logger.warning(f"{folder} holds files of several kinds ({counts}): only the {ranked[0][0]} files are read.")
    kind = ranked[0][0]
    return kind, _by_split(found[kind], folder)


def _by_split(paths, folder):
    relative = {path: path.relative_to(folder).as_posix() for path in paths}
    for split_of in (_split_of_shard, _split_of_words):
        splits: dict[str, list[str]] = {}
        for path in paths:
            if split := split_of(relative[path]):
                splits.setdefault(split, []).append(str(path))
        if splits:
            return splits
    return {"train": [str(path) for path in paths]}


def _split_of_shard(relative):
    match = _SHARD.fullmatch(relative)
    return match and match[1]


def _split_of_words(relative):
    words = re.split(r"[-._ 0-9/]+", relative.lower())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), None)


def suffixes() -> str:
    return ", ".join(KINDS)


@contextlib.contextmanager
def open_text(path: str | os.PathLike) -> Iterator:
    """Opens a file for bytes, decompressed according to its name."""
    with open(path, "rb") as raw:
        with _expanded(path, raw) as file:
            yield file


@contextlib.contextmanager
def _expanded(path, raw):
    import fsspec

    compression = _COMPRESSIONS.get(os.path.splitext(os.fspath(path))[1].lower())
    if compression is None:
        yield raw
        return
    if compression not in fsspec.compression.compr:
        raise TranscoderError(
            f"{printable(path)} is compressed by {compression}, for which a package is missing: expand the file first."
        )
    try:
        with fsspec.compression.compr[compression](raw, mode="rb") as file:
            yield file
    except TranscoderError:
        raise
    except Exception as error:
        # Each library has its own errors.
        raise TranscoderError(
            f"{printable(path)} is not a whole {compression} file: copy or download it again."
        ) from error


def check_files(files: Sequence[str], kind: str) -> None:
    """
    Checks the start of files before they are read.

    Raises:
        [`TranscoderError`]: a file cannot be read, is damaged, is of another kind than its name, or expands to many times
            its size.
    """
    for path in files:
        try:
            with open_text(path) as file:
                start = file.read(_START_BYTES)
            _check_expansion(path)
            if kind == "parquet":
                _check_parquet(path, start)
        except OSError as error:
            raise TranscoderError(f"{printable(path)} cannot be read: {error.strerror or error}.") from error
        if "::" in path:
            raise TranscoderError(f"{printable(path)} has '::' in its name, which `datasets` cannot read: rename it.")
        if kind == "parquet":
            continue
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise TranscoderError(f"{printable(path)} is UTF-16 text: save it as UTF-8.")
        if b"\x00" in start:
            raise TranscoderError(
                f"{printable(path)} is not text, because it holds zero bytes: give a {suffixes()} file."
            )


def _check_expansion(path):
    """Refuse a compressed file that would fill the disk, by the size of its expanded start."""
    if os.path.splitext(path)[1].lower() not in _COMPRESSIONS:
        return
    with open(path, "rb") as raw, _expanded(path, raw) as file:
        expanded = 0
        while raw.tell() < _COMPRESSED_BYTES and expanded < _EXPANDED_BYTES and (part := file.read(1 << 20)):
            expanded += len(part)
        if expanded >= _EXPANDED_BYTES and expanded > _LARGEST_RATIO * raw.tell():
            raise TranscoderError(
                f"{printable(path)} expands to more than {_LARGEST_RATIO} times its size, as text does not: expand it first "
                "if that is right."
            )


def _check_parquet(path, start):
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 4))
        end = file.read()
    if start and (not start.startswith(b"PAR1") or end != b"PAR1"):
        raise TranscoderError(f"{printable(path)} is not a whole Parquet file: copy or download it again.")
