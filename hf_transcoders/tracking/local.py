"""Record a run as files in its own folder."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import TranscoderError
from ..files import atomic_file, write_text
from ..text import logging
from ..text.strict_json import parse_json, read_json
from .process import this_process
from .tracker import Alert, Tracker


logger = logging.get_logger(__name__)

#: Folder of the records in a run's `output_dir`.
FOLDER = "tracking"
RUN_FILE = "run.json"
SCALARS, HISTOGRAMS, ALERTS = "scalars.jsonl", "histograms.jsonl", "alerts.jsonl"
CLOSING_METRIC = "train/train_runtime"
TABLES, IMAGES, PAGES = "tables", "images", "pages"


class LocalTracker(Tracker):
    """
    Writes the records of a run into `output_dir/tracking`:

    ```
    run.json            facts: name, status, base model, dictionaries, arguments, versions
    scalars.jsonl       {"step": 20, "time": "...", "train/<dictionary>/fvu": 0.31, ...}
    histograms.jsonl    {"step": 20, "name": "...", "edges": [...], "counts": [...]}
    alerts.jsonl        {"step": 20, "level": "warn", "title": "...", "text": "..."}
    tables/<name>.jsonl {"step": 20, <column>: <value>, ...}
    images/<name>.png   pages/<name>.html       the newest of each name
    ```

    Readers skip an incomplete last line. If records cannot be written (such as on a full disk), the run continues without
    them, with one warning.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the run.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.folder = Path(output_dir) / FOLDER
        self._facts: dict[str, Any] = {}
        self._failing = False

    def start(self, facts: Mapping[str, Any], resume_step: int | None = None) -> None:
        """
        Starts the records, or continues them from a checkpoint.

        Args:
            facts (`Mapping[str, Any]`): Facts about the run, as JSON values.
            resume_step (`int`, *optional*):
                Step at which to continue. Records of later steps are deleted, because the run will repeat them. By default
                all earlier records in the folder are deleted.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        if resume_step is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            started = now
        else:
            started = self._read_facts().get("started", now)
            for path in (*self.folder.glob("*.jsonl"), *self.folder.glob(f"{TABLES}/*.jsonl")):
                with self._writing():
                    _drop_later(path, resume_step)
        self._facts = {
            "format_version": 1,
            **facts,
            "started": started,
            "status": "running",
            "process": this_process(),
        }
        if resume_step is not None:
            self._facts["resumed"] = {"step": resume_step, "time": now}
        self._write_facts()

    def update(self, **facts) -> None:
        """Adds or changes facts in `run.json`."""
        self._facts |= facts
        self._write_facts()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._append(SCALARS, {"step": step, "time": datetime.now(UTC).isoformat(), **values})

    def histogram(self, step, name, edges, counts) -> None:
        self._append(HISTOGRAMS, {"step": step, "name": name, "edges": list(edges), "counts": list(counts)})

    def table(self, step, name, rows) -> None:
        for row in rows:
            self._append(f"{TABLES}/{file_name(name)}.jsonl", {"step": step, **row})

    def image(self, step, name, path) -> None:
        target = self.folder / IMAGES / f"{file_name(name)}.png"
        with self._writing(), atomic_file(target) as partial:
            shutil.copyfile(path, partial)

    def page(self, step, name, html) -> None:
        with self._writing():
            write_text(self.folder / PAGES / f"{file_name(name)}.html", html)

    def alert(self, step: int, alert: Alert) -> None:
        self._append(ALERTS, {"step": step, "level": alert.level, "title": alert.title, "text": alert.text})

    def finish(self, status: str) -> None:
        self.update(status=status, ended=datetime.now(UTC).isoformat(timespec="seconds"))

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        path = self.folder / name
        text = json.dumps({key: plain(value) for key, value in line.items()}) + "\n"
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            size = path.stat().st_size if path.exists() else 0
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(text)
            except OSError:
                if path.exists():
                    os.truncate(path, size)  # Otherwise the next line would follow the incomplete one.
                raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failing:
                reason = error.strerror or getattr(error.__cause__, "strerror", None) or error
                logger.warning(
                    f"The records of the run cannot be written into {self.folder} ({reason}): the run continues without them "
                    "until there is room."
                )
            self._failing = True
        else:
            self._failing = False

    def _read_facts(self) -> dict[str, Any]:
        try:
            return read_json(self.folder / RUN_FILE, allow_nan=True)
        except TranscoderError:
            return {}  # It is written again.

    def _write_facts(self) -> None:
        with self._writing():
            write_text(self.folder / RUN_FILE, json.dumps(self._facts, indent=2, default=str) + "\n")


def _drop_later(path: Path, step: int) -> None:
    """Removes lines of a record that a run resumed at `step` writes again, and those that cannot be read."""

    def stays(line):
        entry = _parse(line.decode("utf-8", "replace")) if line.endswith(b"\n") else None
        # The final log comes after the last checkpoint: a run resumed from there writes it again.
        return entry is not None and entry["step"] <= step and CLOSING_METRIC not in entry

    lines = path.read_bytes().splitlines(keepends=True)
    dropped = [number for number, line in enumerate(lines) if not stays(line)]
    if not dropped:
        return
    try:
        with atomic_file(path) as partial:
            partial.write_bytes(b"".join(line for line in lines if stays(line)))
    except OSError:
        # There is no room for a copy. Lines before the first of them are kept, so that no step is recorded twice.
        os.truncate(path, sum(map(len, lines[: dropped[0]])))
        raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a record, without incomplete and damaged ones."""
    return parse_lines(path)[0]


def parse_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a record, and the number of complete lines that could not be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return [], 0
    # Text after the last line break is incomplete: its process died.
    lines = [line for line in text.split("\n")[:-1] if line]
    parsed = [entry for entry in map(_parse, lines) if entry is not None]
    return parsed, len(lines) - len(parsed)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = parse_json(line, "a record")
    except TranscoderError:
        return None
    return entry if isinstance(entry.get("step"), int) else None


def file_name(name: str) -> str:
    """The file name of a record."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def plain(value):
    """A copy as JSON values, without NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
