"""Record histograms, tables, images and alerts in Weights & Biases, also offline."""

from collections.abc import Mapping
from typing import Any

from .tracker import Alert, Tracker


class WandbTracker(Tracker):
    """
    Adds records to the Weights & Biases run that is open in this process. Like transformers' `WandbCallback`, it logs the
    optimizer step as `train/global_step`, the x-axis of charts, instead of setting the step. Without an open run, records
    are left out.
    """

    def scalars(self, step, values) -> None:
        self._log(step, values)

    def histogram(self, step, name, edges, counts) -> None:
        import wandb

        self._log(step, {name: wandb.Histogram(np_histogram=(list(counts), list(edges)))})

    def table(self, step, name, rows) -> None:
        import wandb

        columns = list(rows[0]) if rows else []
        table = wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])
        self._log(step, {name: table})

    def image(self, step, name, path) -> None:
        import wandb

        self._log(step, {name: wandb.Image(str(path))})

    def page(self, step, name, html) -> None:
        import wandb

        self._log(step, {name: wandb.Html(html, inject=False)})

    def alert(self, step: int, alert: Alert) -> None:
        import wandb

        if wandb.run is not None:
            wandb.run.alert(alert.title, f"{alert.text} (step {step})", level=wandb.AlertLevel(alert.level.upper()))  # pyright: ignore[reportAttributeAccessIssue]

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        import wandb

        if wandb.run is not None:
            wandb.run.log({**values, "train/global_step": step})
