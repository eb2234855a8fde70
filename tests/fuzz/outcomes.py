"""What may happen when a damaged file is read, and how one case is told from another."""

import hashlib
import json
import logging
import math
import re
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from hf_transcoders import TranscoderError


#: What is right: the damage did not matter, it changed what was read, or it was refused in a sentence.
RIGHT = ("equal", "changed", "refused")
#: What is a fault, and what it means.
FAULTS = {
    "unclear": "an error that is not a sentence for the user",
    "crash": "read without a warning, and an error on use",
    "nan": "numbers that are not finite came in without a warning",
    "hang": "more processor time than any file of this size may take",
    "memory": "more memory than twice the files and a constant",
    "death": "the process ended",
    "outside": "a file outside was opened or written",
    "left": "files were left or changed",
}

_LONGEST_SENTENCE = 1500


class Hang(BaseException):
    """Raised by the timer; no `except Exception` may swallow it."""


def is_refusal(error: BaseException, sample: Path) -> bool:
    """Whether an error tells its reader what is wrong: ours, in one printable sentence, or one of the Hub's with the file."""
    text = str(error)
    if isinstance(error, TranscoderError):
        return (
            "\n" not in text.strip()
            and len(text) <= _LONGEST_SENTENCE
            and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
        )
    names = [sample.name, *(path.name for path in sample.rglob("*"))]
    return isinstance(error, OSError) and any(name in text for name in names)


def is_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or any(
        words in text
        for words in (
            "can't allocate memory",
            "not enough memory",
            "Cannot allocate",
            "Storage size calculation overflowed",
        )
    )


def place_of(error: BaseException) -> str:
    """The innermost frame in the library, as file and function."""
    found, seen = "", set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame in traceback.extract_tb(error.__traceback__):
            if "/hf_transcoders/" in frame.filename:
                found = f"{frame.filename.rsplit('/hf_transcoders/', 1)[1]}:{frame.name}"
        error = error.__cause__ or error.__context__
    return found


def digest(value, place: Path) -> str:
    """A value's bits, the same wherever the sample lies."""
    hashed = hashlib.sha256()

    def add(part):
        if isinstance(part, torch.Tensor):
            hashed.update(f"{part.dtype}{tuple(part.shape)}".encode())
            hashed.update(
                part.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if part.numel() else b""
            )
        elif isinstance(part, dict):
            for key, entry in sorted(part.items(), key=lambda pair: str(pair[0])):
                add(str(key)), add(entry)
        elif isinstance(part, list | tuple):
            hashed.update(f"[{len(part)}".encode())
            for entry in part:
                add(entry)
        else:
            hashed.update(
                f"{type(part).__name__}:{part!r}".replace(str(place), "").encode("utf-8", "backslashreplace")
            )

    add(value)
    return hashed.hexdigest()


def count_not_finite(value) -> int:
    """Numbers in a value that are NaN or infinite."""
    if isinstance(value, torch.Tensor):
        return int((~value.isfinite()).sum()) if value.is_floating_point() else 0
    if isinstance(value, float):
        return not math.isfinite(value)
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(count_not_finite, entries))


@contextmanager
def messages():
    """Collects what is said by warnings and logs inside the block."""
    said = []

    class Collector(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    collector = Collector(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("", "transformers")]
    for logger in loggers:
        logger.addHandler(collector)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
            said += [str(warning.message) for warning in caught]
    finally:
        for logger in loggers:
            logger.removeHandler(collector)


def speaks_of_nan(said: list[str]) -> bool:
    return any(re.search(r"\bnan\b|infinit|finite|\binf\b", text, re.IGNORECASE) for text in said)


def table(records: list[dict]) -> str:
    """How often what happened, by target, and the faults below it: each kind with a case to replay."""
    columns = [*RIGHT, *FAULTS]
    names = sorted({record["target"] for record in records})
    lines = [f"{'':12}" + "".join(f"{column:>9}" for column in columns)]
    for name in [*names, "all"]:
        counts = [sum(r["outcome"] == column and name in (r["target"], "all") for r in records) for column in columns]
        lines.append(f"{name:12}" + "".join(f"{count or '.':>9}" for count in counts))
    kinds: dict[tuple, list] = {}
    for record in records:
        if record["outcome"] in FAULTS:
            error = record.get("error", "").split(":")[0]
            kinds.setdefault((record["target"], record["outcome"], error, record.get("where", "")), []).append(record)
    for (target, outcome, error, where), cases in sorted(kinds.items(), key=lambda item: (item[0][0], -len(item[1]))):
        first = cases[0]
        lines.append(f"\n{target}: {outcome} {error} {where} ({len(cases)})")
        lines.append(f"    --replay {target}:{first['number']}   {first['what'][:110]}")
        if first.get("error"):
            lines.append(f"    {json.dumps(first['error'][:160], ensure_ascii=False)}")
    return "\n".join(lines)
