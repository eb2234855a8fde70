"""What every place that records a run can be given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass
class Alert:
    """
    Something about a run that somebody should look at.

    Args:
        level (`"info"`, `"warn"` or `"error"`): How urgent it is.
        title (`str`): A few words, the same for every alert of this kind.
        text (`str`): One sentence with the figures.
    """

    level: Literal["info", "warn", "error"]
    title: str
    text: str


class Tracker:
    """
    One place that records of a run go to: files, Trackio, TensorBoard, Weights & Biases. A tracker that cannot show a kind
    of record leaves it out; the files ([`LocalTracker`]) keep all of them.
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, under names such as `train/<dictionary>/fvu`."""

    def histogram(self, step: int, name: str, edges: Sequence[float], counts: Sequence[int]) -> None:
        """Counts between `edges`, one number fewer than those."""

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows that share their columns: text, numbers, booleans or `None`."""

    def image(self, step: int, name: str, path: Path) -> None:
        """A PNG file."""

    def page(self, step: int, name: str, html: str) -> None:
        """A self-contained HTML page."""

    def alert(self, step: int, alert: Alert) -> None:
        """Something to look at."""

    def finish(self, status: str) -> None:
        """The run ended: `"finished"`, `"failed"` or `"interrupted"`."""
