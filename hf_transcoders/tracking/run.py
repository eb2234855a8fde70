"""Read the records of runs."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ..errors import TranscoderError
from ..evaluation.evaluation_report import EvaluationReport
from ..reports.pareto.fronts import MeasuredDictionary
from ..text.strict_json import parse_json, read_json
from .local import ALERTS, FOLDER, HISTOGRAMS, RUN_FILE, SCALARS, TABLES, file_name, parse_lines, plain, read_lines
from .process import is_gone


#: Time without records after which a run counts as silent, if its process cannot be checked.
SILENT_AFTER = timedelta(hours=1)

EVALUATION_FILE = "evaluation.json"

# Types of the facts in `run.json`.
_KINDS = {
    "arguments": dict, "base_model": str, "dictionaries": dict, "ended": str, "evaluation_protocol": dict, "process": dict,
    "resumed": dict, "started": str, "versions": dict,
}  # fmt: skip


@dataclass
class Run:
    """
    A recorded run.

    Args:
        name (`str`): Name of the run.
        facts (`dict[str, Any]`): Content of `run.json`: status, base model, dictionaries, arguments, versions.
        scalars (`list[dict[str, Any]]`): Logs, each with `step` and `time`.
        histograms (`list[dict[str, Any]]`): Histograms with `step`, `name`, `edges`, `counts`.
        alerts (`list[dict[str, Any]]`): Alerts with `step`, `level`, `title`, `text`.
        folder (`Path`, *optional*): `output_dir` of the run, if it was read from files.
        problems (`list[str]`): Records that could not be read.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    scalars: list[dict[str, Any]] = field(default_factory=list)
    histograms: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None
    problems: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, output_dir: str | os.PathLike) -> "Run":
        """Reads the records in the folder of a run."""
        folder = Path(output_dir)
        records = folder / FOLDER
        try:
            content = (records / RUN_FILE).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise TranscoderError(
                f"{folder} holds no run ({FOLDER}/{RUN_FILE} is not there): give the output folder of a run, or a folder "
                "above several."
            ) from error
        except OSError as error:
            raise TranscoderError(
                f"{records / RUN_FILE} cannot be read ({error.strerror or error}): fix this, or copy the run again."
            ) from error
        try:
            facts = parse_json(content, str(records / RUN_FILE), allow_nan=True)
        except TranscoderError as error:
            raise TranscoderError(f"{records / RUN_FILE} is damaged: remove it, or copy it again.") from error
        wrong = [name for name, kind in _KINDS.items() if not isinstance(facts.get(name), kind | None)]
        facts = {name: value for name, value in facts.items() if name not in wrong}
        read, problems = {}, [f"{name} in {RUN_FILE} is damaged" for name in wrong]
        for name in (SCALARS, HISTOGRAMS, ALERTS):
            lines, damaged = parse_lines(records / name)
            read[name] = [line for line in lines if name != SCALARS or _has_numbers(line)]
            damaged += len(lines) - len(read[name])
            if damaged:
                problems.append(f"{damaged} damaged line{'s' if damaged > 1 else ''} in {name}")
        return cls(
            name=str(facts.get("name") or folder.resolve().name),
            facts=facts,
            scalars=read[SCALARS],
            histograms=read[HISTOGRAMS],
            alerts=read[ALERTS],
            folder=folder,
            problems=problems,
        )

    @classmethod
    def from_log_history(cls, history: Iterable[Mapping[str, Any]], name: str = "", **facts) -> "Run":
        """
        Makes a run from `trainer.state.log_history`, with the names that trackers record.

        Args:
            history (`Iterable[Mapping[str, Any]]`): Log, with `step` in every entry.
            name (`str`, *optional*): Name of the run.
            facts: Further facts about the run.
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
        """The rows of a recorded table, oldest first."""
        return read_lines(self.folder / FOLDER / TABLES / f"{file_name(name)}.jsonl") if self.folder else []

    def history(self, metric: str) -> list[tuple[int, float]]:
        """The `(step, value)` pairs of a metric, such as `train/<dictionary>/fvu`."""
        return [(line["step"], line[metric]) for line in self.scalars if line.get(metric) is not None]

    def latest(self) -> dict[str, float]:
        """The last value of every metric."""
        latest: dict[str, float] = {}
        for line in self.scalars:
            latest |= {key: value for key, value in line.items() if key not in ("step", "time") and value is not None}
        return latest

    # ------------------------------------------------------------------------------------------------ state

    @property
    def last_word(self) -> datetime | None:
        """The time of the latest record of the run, if known."""
        resumed = self.facts.get("resumed")
        times = [
            self.facts.get("started"),
            self.facts.get("ended"),
            resumed.get("time") if isinstance(resumed, dict) else None,
            *(line.get("time") for line in self.scalars[-1:]),
        ]
        return max(filter(None, map(_time, times)), default=None)

    @property
    def status(self) -> str:
        """
        The status of the run: `"finished"`, `"failed"`, `"interrupted"` or `"running"` as recorded; `"died"` if its process has
        ended while it was recorded as running, or `"silent"` if its process runs elsewhere and recorded nothing for
        [`SILENT_AFTER`]; `"unknown"` if no status was recorded, and `"damaged"` if `run.json` cannot be read.
        """
        recorded = str(self.facts.get("status", "unknown"))
        if recorded != "running":
            return recorded
        process = self.facts.get("process")
        gone = is_gone(process) if isinstance(process, dict) else None
        if gone is not None:
            return "died" if gone else "running"
        last = self.last_word
        return "silent" if last is None or datetime.now(UTC) - last > SILENT_AFTER else "running"

    # ------------------------------------------------------------------------------------------------ numbers

    def measured(self) -> list[MeasuredDictionary]:
        """
        Returns the latest metrics of every dictionary: of the last logged evaluation, else of `evaluation.json`, else of the
        last training log, as named in `source`.
        """
        report, found = self._evaluation_file(), {}
        for name, (step, metrics) in self._newest("eval").items():
            found[name] = MeasuredDictionary(
                self.name, name, metrics, "evaluation", step, self._protocol(report, name, metrics)
            )
        for name, entry in (report.dictionaries if report else {}).items():
            found.setdefault(
                name, MeasuredDictionary(self.name, name, entry["metrics"], EVALUATION_FILE, None, report.protocol)
            )
        for name, (step, metrics) in self._newest("train").items():
            protocol = {"base_model": self.facts.get("base_model"), "dataset": "training batches"}
            found.setdefault(name, MeasuredDictionary(self.name, name, metrics, "training", step, protocol))
        for name, measured in found.items():
            config = self.config_of(name, report)
            # Sites are parsed; other values are shown as they are.
            measured.config = {
                key: value
                for key, value in config.items()
                if not key.endswith("_site") or isinstance(value, str | None)
            }
        return list(found.values())

    def config_of(self, dictionary: str, report: EvaluationReport | None = None) -> dict[str, Any]:
        """The known configuration of a dictionary, from the run's facts, its evaluation and its saved files."""
        dictionaries = self.facts.get("dictionaries")
        if isinstance(dictionaries, dict) and isinstance(dictionaries.get(dictionary), dict):
            return dictionaries[dictionary]
        if report is not None and dictionary in report.dictionaries:
            return report.dictionaries[dictionary]["config"]
        for folder in (self.folder / dictionary, self.folder) if self.folder else ():
            with contextlib.suppress(TranscoderError):
                return read_json(folder / "config.json", allow_nan=True)
        return {}

    def _newest(self, stage: str) -> dict[str, tuple[int, dict[str, float]]]:
        """Dictionary -> step and values of its last `<stage>/<dictionary>/<metric>` with an FVU."""
        newest: dict[str, tuple[int, dict[str, float]]] = {}
        for line in self.scalars:
            for key, value in line.items():
                parts = key.split("/")
                if len(parts) != 3 or parts[0] != stage or not isinstance(value, int | float):
                    continue
                step, metrics = newest.get(parts[1], (None, {}))
                newest[parts[1]] = (line["step"], {**(metrics if step == line["step"] else {}), parts[2]: value})
        return {name: values for name, values in newest.items() if values[1].keys() >= {"l0", "fvu"}}

    def _evaluation_file(self) -> EvaluationReport | None:
        path = self.folder / EVALUATION_FILE if self.folder else None
        if path is None or not path.exists():
            return None
        try:
            report = EvaluationReport.load_json(path)
            return (
                report
                if all({"metrics", "config"} <= entry.keys() for entry in report.dictionaries.values())
                else None
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if (problem := f"{EVALUATION_FILE} is damaged") not in self.problems:
                self.problems.append(problem)
            return None

    def _protocol(
        self, report: EvaluationReport | None, name: str, metrics: dict[str, float]
    ) -> dict[str, Any] | None:
        """The protocol of a logged evaluation: as recorded, or that of `evaluation.json` if it has the same metrics."""
        recorded = self.facts.get("evaluation_protocol")
        if isinstance(recorded, dict):
            return recorded
        if report is None or name not in report.dictionaries:
            return None
        filed = report.dictionaries[name]["metrics"]
        same = all(filed.get(metric) == value for metric, value in metrics.items() if metric in filed)
        return report.protocol if same and metrics.keys() & filed.keys() else None


def recorded_run(folder: str | os.PathLike) -> Run | None:
    """The run recorded in a folder; `None` if there is none."""
    return Run.load(folder) if Path(folder, FOLDER, RUN_FILE).exists() else None


def find_runs(root: str | os.PathLike) -> Iterator[Run]:
    """
    Finds the runs in a folder and below it, sorted by name. Runs whose `run.json` cannot be read have the status
    `"damaged"`.
    """
    for path in sorted(Path(root).rglob(f"{FOLDER}/{RUN_FILE}")):
        folder = path.parent.parent
        try:
            yield Run.load(folder)
        except (TranscoderError, OSError) as error:
            yield Run(folder.resolve().name, {"status": "damaged"}, folder=folder, problems=[str(error)])


def _has_numbers(line: Mapping[str, Any]) -> bool:
    values = [value for name, value in line.items() if name != "time" and value is not None]
    return all(isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63) for value in values)


def _time(value) -> datetime | None:
    try:
        time = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
