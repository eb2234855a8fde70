"""Reading back what runs have recorded."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import TranscoderError
from .local import ALERTS, FOLDER, HISTOGRAMS, RUN_FILE, SCALARS, TABLES, file_name, plain, read_lines


@dataclass
class Run:
    """
    A recorded run.

    Args:
        name (`str`): What it is called.
        facts (`dict[str, Any]`): As in `run.json`: status, base model, dictionaries, arguments, versions.
        scalars (`list[dict[str, Any]]`): One entry a log, with `step` and `time`.
        histograms (`list[dict[str, Any]]`): `step`, `name`, `edges`, `counts`.
        alerts (`list[dict[str, Any]]`): `step`, `level`, `title`, `text`.
        folder (`Path`, *optional*): The run's `output_dir`, where it was read from files.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    scalars: list[dict[str, Any]] = field(default_factory=list)
    histograms: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None

    @classmethod
    def load(cls, output_dir: str | os.PathLike) -> "Run":
        """Reads the records in a run's folder."""
        folder = Path(output_dir)
        records = folder / FOLDER
        try:
            facts = json.loads((records / RUN_FILE).read_text())
        except FileNotFoundError as error:
            raise TranscoderError(
                f"{folder} holds no run ({FOLDER}/{RUN_FILE} is not there): give the output folder of a run, or a folder "
                "above several."
            ) from error
        except ValueError as error:
            raise TranscoderError(f"{records / RUN_FILE} is damaged: remove it, or copy it again.") from error
        return cls(
            name=facts.get("name") or folder.resolve().name,
            facts=facts,
            scalars=read_lines(records / SCALARS),
            histograms=read_lines(records / HISTOGRAMS),
            alerts=read_lines(records / ALERTS),
            folder=folder,
        )

    @classmethod
    def from_log_history(cls, history: Iterable[Mapping[str, Any]], name: str = "", **facts) -> "Run":
        """
        A run from `trainer.state.log_history`, under the names that trackers record.

        Args:
            history (`Iterable[Mapping[str, Any]]`): The log, with `step` in every entry.
            name (`str`, *optional*): What the run is called.
            facts: What else is known of it.
        """
        scalars = []
        for entry in history:
            values = {
                f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": plain(value)
                for key, value in entry.items()
                if key != "step"
            }
            scalars.append({"step": entry["step"], **values})
        return cls(name=name, facts=facts, scalars=scalars)

    def table(self, name: str) -> list[dict[str, Any]]:
        """The rows recorded under `name`, oldest first."""
        return read_lines(self.folder / FOLDER / TABLES / f"{file_name(name)}.jsonl") if self.folder else []

    def history(self, metric: str) -> list[tuple[int, float]]:
        """`(step, value)` of a metric, such as `train/<dictionary>/fvu`."""
        return [(line["step"], line[metric]) for line in self.scalars if line.get(metric) is not None]

    def latest(self) -> dict[str, float]:
        """The last value of every metric."""
        latest: dict[str, float] = {}
        for line in self.scalars:
            latest |= {key: value for key, value in line.items() if key not in ("step", "time") and value is not None}
        return latest


def find_runs(root: str | os.PathLike) -> Iterator[Run]:
    """The runs in a folder and below it, in the order of their names."""
    for path in sorted(Path(root).rglob(f"{FOLDER}/{RUN_FILE}")):
        yield Run.load(path.parent.parent)
