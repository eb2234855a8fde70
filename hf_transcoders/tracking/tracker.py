"""The interface of trackers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass
class Alert:
    """
    An alert about a run.

    Args:
        level (`"info"`, `"warn"` or `"error"`): Severity.
        title (`str`): Short title, the same for every alert of this kind.
        text (`str`): One sentence with the figures.
    """

    level: Literal["info", "warn", "error"]
    title: str
    text: str


class Tracker:
    """
    Base class of trackers, which record a run in files, Trackio, TensorBoard or Weights & Biases. Trackers leave out kinds
    of records that they cannot show; the [`LocalTracker`] records all of them.
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records metrics of one step by name, such as `train/<dictionary>/fvu`."""

    def histogram(self, step: int, name: str, edges: Sequence[float], counts: Sequence[int]) -> None:
        """Records a histogram: the counts between `edges`, one fewer than the edges."""

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records a table: rows with the same columns of text, numbers, booleans or `None`."""

    def image(self, step: int, name: str, path: Path) -> None:
        """Records a PNG file."""

    def page(self, step: int, name: str, html: str) -> None:
        """Records a self-contained HTML page."""

    def alert(self, step: int, alert: Alert) -> None:
        """Records an alert."""

    def finish(self, status: str) -> None:
        """Records the final status of the run: `"finished"`, `"failed"` or `"interrupted"`."""
