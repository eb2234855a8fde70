"""Read runs from Trackio's local database."""

import math
from collections.abc import Iterator
from typing import Any

from ..errors import TranscoderError
from .run import Run


# Fields of a dictionary's configuration, which transformers' callback logs among the arguments of a run with one model.
_CONFIG = ("input_site", "output_site", "d_in", "d_out", "num_features", "activation", "k")


def trackio_runs(project: str) -> Iterator[Run]:
    """
    Reads the runs of a project in Trackio's local database (`$TRACKIO_DIR`), oldest first. Trackio does not record the final
    status of a run, which is `"unknown"`.

    Args:
        project (`str`): Name of the project.

    Returns:
        `Iterator[Run]`
    """
    try:
        import trackio
    except ImportError as error:
        raise TranscoderError(
            'Trackio is not installed: install it with `pip install "hf_transcoders[trackio]"`.'
        ) from error
    try:
        found = trackio.Api().runs(project)
    except ValueError as error:
        raise TranscoderError(
            f"Trackio's local database has no project '{project}': `trackio list projects` names those there are."
        ) from error
    for run in found:
        yield _read(project, run)


def trackio_run(project: str, name: str) -> Run:
    """
    Reads a run of a project in Trackio's local database, the latest of several with the same name.

    Args:
        project (`str`): Name of the project.
        name (`str`): Name of the run.

    Returns:
        [`Run`]
    """
    runs = list(trackio_runs(project))
    found = [run for run in runs if run.name == name]
    if not found:
        names = ", ".join(run.name for run in runs) or "it has none"
        raise TranscoderError(f"Trackio's project '{project}' has no run '{name}': choose from its runs ({names}).")
    return found[-1]


def _read(project: str, run) -> Run:
    from trackio.sqlite_storage import SQLiteStorage

    scalars, histograms = [], []
    for line in SQLiteStorage.get_logs(project, run.name, run_id=run.id):
        # Transformers' callback counts its logs and logs the optimizer step as a metric.
        own_step, time = line.pop("step"), line.pop("timestamp")
        step = int(line.pop("train/global_step", own_step))
        numbers = {key: value for key, value in line.items() if _is_number(value)}
        if numbers:
            scalars.append({"step": step, "time": str(time), **numbers})
        for key, value in line.items():
            if isinstance(value, dict) and value.get("_type") == "trackio.histogram":
                histograms.append({"step": step, "name": key, "edges": value["bins"], "counts": value["values"]})
    config = dict(run.config or {})
    facts = {
        "name": run.name,
        "project": project,
        "started": config.get("_Created"),
        "base_model": config.get("base_model_name_or_path"),
        "dictionaries": config.get("dictionaries") or _only_dictionary(config, scalars),
        "arguments": {key: value for key, value in config.items() if not key.startswith("_")},
    }
    alerts = [
        {"step": alert["step"], "level": alert["level"], "title": alert["title"], "text": alert["text"]}
        for alert in run.alerts()
    ]
    return Run(
        name=run.name,
        facts={key: value for key, value in facts.items() if value},
        scalars=sorted(scalars, key=lambda line: line["step"]),
        histograms=histograms,
        alerts=alerts,
    )


def _only_dictionary(config: dict[str, Any], scalars: list[dict[str, Any]]) -> dict[str, dict]:
    names = {key.split("/")[1] for line in scalars for key in line if key.count("/") == 2}
    if len(names) != 1 or config.get("input_site") is None:
        return {}
    return {names.pop(): {key: config.get(key) for key in _CONFIG}}


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
