"""Record histograms, tables, images and alerts in TensorBoard's event files."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .tracker import Alert, Tracker


class TensorBoardTracker(Tracker):
    """
    Writes its own event file into the folder of transformers' `TensorBoardCallback`, which TensorBoard reads as one run.
    Pages are left out.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the run.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.output_dir = Path(output_dir)
        self._writer = None

    @property
    def writer(self):
        """The `SummaryWriter`, created at the first record, when the folder of the callback exists."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=str(self._folder()))
        return self._writer

    def _folder(self) -> Path:
        if folder := os.environ.get("TENSORBOARD_LOGGING_DIR"):
            return Path(folder).expanduser()
        # The callback names its folder by the time, and is not accessible from here, but its file is the newest.
        files = sorted(self.output_dir.glob("runs/**/events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
        return files[-1].parent if files else self.output_dir / "runs"

    def scalars(self, step, values) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def histogram(self, step, name, edges, counts) -> None:
        middles = [(low + high) / 2 for low, high in zip(edges[:-1], edges[1:], strict=True)]
        self.writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(count * x for count, x in zip(counts, middles, strict=True)),
            sum_squares=sum(count * x * x for count, x in zip(counts, middles, strict=True)),
            # TensorBoard extends the first bucket to the smallest float: an empty bucket before it preserves the edge.
            bucket_limits=list(edges),
            bucket_counts=[0, *counts],
            global_step=step,
        )
        self.writer.flush()

    def table(self, step, name, rows) -> None:
        self.writer.add_text(name, markdown_table(rows), step)
        self.writer.flush()

    def image(self, step, name, path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def alert(self, step: int, alert: Alert) -> None:
        self.writer.add_text(f"alerts/{alert.title}", f"**{alert.level}** {escape(alert.text)}", step)
        self.writer.flush()

    def finish(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, with escaped texts."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [["" if row[column] is None else _cell(row[column]) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = escape(text).replace("\n", "⏎")
    return "".join(f"\\{c}" if c in "\\`*_[]|~" else c for c in text)
