"""Rich records in Trackio: a local database and its dashboard, no service."""

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from .tracker import Alert, Tracker


class TrackioTracker(Tracker):
    """
    Adds to the Trackio run that is open in this process, whoever opened it: transformers' `TrackioCallback`, or
    `trackio.init`.

    Transformers' callback numbers its logs 0, 1, 2 ... and writes the optimizer step beside them as
    `train/global_step`. A record with a step of its own would push that count forward, so this tracker does as the
    callback does, unless the run is known to count optimizer steps.

    Args:
        optimizer_steps (`bool`, *optional*, defaults to `False`):
            Whether the run's own steps are optimizer steps, as they are where `TranscoderTrainer` reports to Trackio.
    """

    def __init__(self, optimizer_steps: bool = False):
        self.optimizer_steps = optimizer_steps

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

        # Trackio prints alerts; stdout belongs to results.
        with redirect_stdout(sys.stderr):
            self._run().alert(
                alert.title,
                alert.text,
                level=trackio.AlertLevel(alert.level),
                step=step if self.optimizer_steps else None,
            )

    def finish(self, status: str) -> None:
        # A run that ends well is closed by whoever opened it; after an error nobody would come by to write what waits.
        run = self._run()
        if status != "finished" and run is not None:
            import trackio

            with redirect_stdout(sys.stderr):
                trackio.finish()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run().log({**values, "train/global_step": step}, step=step if self.optimizer_steps else None)

    def _run(self):
        from trackio import context_vars

        return context_vars.current_run.get()
