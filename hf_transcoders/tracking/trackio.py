"""Rich records in Trackio: a local database and its dashboard, no service."""

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
    Adds to the Trackio run that is open in this process, whoever opened it: transformers' `TrackioCallback`, or
    `trackio.init`. Where none is open, there is nothing to add to and records are left out.

    Transformers' callback numbers its logs 0, 1, 2 ... and writes the optimizer step beside them as
    `train/global_step`. A record with a step of its own would push that count forward, so this tracker does as the
    callback does, unless the run is known to count optimizer steps.

    Args:
        optimizer_steps (`bool`, *optional*, defaults to `False`):
            Whether the run's own steps are optimizer steps, as they are with [`TranscoderTrackioCallback`].
        resumed (`bool`, *optional*, defaults to `False`):
            Whether the run was resumed from a checkpoint. It comes by steps again that are recorded already: what stands
            there under the same name is not recorded twice.
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
            # Trackio prints alerts; stdout belongs to results.
            with redirect_stdout(sys.stderr):
                level = trackio.AlertLevel(alert.level)
                run.alert(alert.title, alert.text, level=level, step=step if self.optimizer_steps else None)

    def finish(self, status: str) -> None:
        # A run that ends well is closed by whoever opened it; after an error nobody comes by to write what still waits.
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
        """What an earlier process has recorded at a step."""
        if not (self.resumed and self.optimizer_steps):
            return set()
        if self._recorded is None:
            self._recorded = _recorded_names()
        return self._recorded.get(step, set())


class TranscoderTrackioCallback(TrackioCallback):
    """
    Transformers' callback with three differences: the run's steps are optimizer steps; a run that is resumed from a
    checkpoint goes on as one run, without doubled steps; what Trackio prints goes to stderr.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._initialized = False  # After a run that failed, the callback would believe it still open.
        self._tracker = TrackioTracker(optimizer_steps=True, resumed=state.global_step > 0)
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def setup(self, args, state, model, **kwargs):
        with redirect_stdout(sys.stderr):
            super().setup(args, state, model, **kwargs)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if not self._initialized:
            # An evaluation before training, or after it: the run is opened (again).
            self._tracker = TrackioTracker(optimizer_steps=True)
            self.setup(args, state, model)
        if state.is_world_process_zero:
            self._tracker.scalars(state.global_step, rewrite_logs(logs))

    def on_train_end(self, *args, **kwargs):
        with redirect_stdout(sys.stderr):
            super().on_train_end(*args, **kwargs)


def free_run_name(project: str, name: str) -> str:
    """`name`, or `name-2`, `name-3` ... where Trackio's local database has runs of that name."""
    import trackio

    try:
        taken = {run.name for run in trackio.Api().runs(project)}
    except ValueError:  # There is no such project yet.
        return name
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def _open_run():
    from trackio import context_vars

    return context_vars.current_run.get()


def _recorded_names() -> dict[int, set[str]]:
    """Step -> names recorded there, of the open run in the local database."""
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
