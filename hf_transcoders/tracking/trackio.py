"""Record histograms, tables, images and alerts in Trackio, a local database with a dashboard."""

import sys
from collections import defaultdict
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from transformers.integrations import TrackioCallback
from transformers.integrations.integration_utils import rewrite_logs

from .tracker import Alert, Tracker


class TrackioTracker(Tracker):
    """
    Adds records to the Trackio run that is open in this process, opened by transformers' `TrackioCallback` or `trackio.init`.
    Without an open run, records are left out.

    Transformers' callback numbers its logs 0, 1, 2 ... and logs the optimizer step as `train/global_step`. A record with
    another step would advance that count, so this tracker does the same, unless the run counts optimizer steps.

    Args:
        optimizer_steps (`bool`, *optional*, defaults to `False`):
            Whether the steps of the run are optimizer steps, as with [`TranscoderTrackioCallback`].
        resumed (`bool`, *optional*, defaults to `False`):
            Whether the run was resumed from a checkpoint. It may repeat steps; records with the same name and step are not
            recorded twice.
    """

    def __init__(self, optimizer_steps: bool = False, resumed: bool = False):
        self.optimizer_steps = optimizer_steps
        self.resumed = resumed
        self._recorded: dict[int, set[str]] | None = None

    def scalars(self, step, values) -> None:
        self._log(step, values)

    def histogram(self, step, name, edges, counts) -> None:
        import trackio

        self._log(step, {name: trackio.Histogram(np_histogram=(list(counts), list(edges)))})

    def table(self, step, name, rows) -> None:
        import trackio

        self._log(step, {name: trackio.Table(data=[dict(row) for row in rows])})

    def image(self, step, name, path) -> None:
        import trackio

        self._log(step, {name: trackio.Image(path)})

    def page(self, step, name, html) -> None:
        import trackio

        self._log(step, {name: trackio.Html(html, inject=False)})

    def alert(self, step: int, alert: Alert) -> None:
        import trackio

        if (run := _open_run()) is not None and f"alert: {alert.title}" not in self._names_at(step):
            # Trackio prints alerts, but stdout is for results.
            with redirect_stdout(sys.stderr):
                level = trackio.AlertLevel(alert.level)
                run.alert(alert.title, alert.text, level=level, step=step if self.optimizer_steps else None)

    def finish(self, status: str) -> None:
        # A finished run is closed by the code that opened it; after an error, pending records must be written here.
        if status != "finished" and _open_run() is not None:
            import trackio

            with redirect_stdout(sys.stderr):
                trackio.finish()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        run = _open_run()
        new = {name: value for name, value in values.items() if name not in self._names_at(step)}
        if run is not None and new:
            run.log({**new, "train/global_step": step}, step=step if self.optimizer_steps else None)

    def _names_at(self, step: int) -> set[str]:
        """Names recorded at a step by an earlier process."""
        if not (self.resumed and self.optimizer_steps):
            return set()
        if self._recorded is None:
            self._recorded = _recorded_names()
        return self._recorded.get(step, set())


class TranscoderTrackioCallback(TrackioCallback):
    """
    Transformers' callback with three differences: the steps of the run are optimizer steps; a resumed run continues the
    same run without duplicate steps; and Trackio's output goes to stderr.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._initialized = False  # After a failed run, the callback would take it for open.
        self._tracker = TrackioTracker(optimizer_steps=True, resumed=state.global_step > 0)
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def setup(self, args, state, model, **kwargs):
        with redirect_stdout(sys.stderr):
            super().setup(args, state, model, **kwargs)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if not self._initialized:
            # An evaluation before or after training opens the run (again).
            self._tracker = TrackioTracker(optimizer_steps=True)
            self.setup(args, state, model)
        if state.is_world_process_zero:
            self._tracker.scalars(state.global_step, rewrite_logs(logs))

    def on_train_end(self, *args, **kwargs):
        with redirect_stdout(sys.stderr):
            super().on_train_end(*args, **kwargs)


def free_run_name(project: str, name: str) -> str:
    """A name without a run in Trackio's local database: `name`, `name-2`, `name-3` ..."""
    import trackio

    try:
        taken = {run.name for run in trackio.Api().runs(project)}
    except ValueError:  # The project does not exist yet.
        return name
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def _open_run():
    from trackio import context_vars

    return context_vars.current_run.get()


def _recorded_names() -> dict[int, set[str]]:
    """Step -> names recorded at it, for the open run in the local database."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    run, names = _open_run(), defaultdict(set)
    if run is not None:
        for line in SQLiteStorage.get_logs(run.project, run.name, run_id=run.id):
            names[line["step"]] |= line.keys()
        for other in trackio.Api().runs(run.project):
            if other.id == run.id:
                for alert in other.alerts():
                    names[alert["step"]].add(f"alert: {alert['title']}")
    return names
