"""Figures of matplotlib, and the scatter plot of an evaluation for trackers."""

import os
from pathlib import Path

from ..errors import TranscoderError
from ..evaluation.evaluation_report import EvaluationReport
from ..files import atomic_file
from .plots import COLORS, L0_LABEL


def new_figure(width: float, height: float, layout: str | None = "constrained"):
    """Make an empty `matplotlib.figure.Figure` that needs no display, with its size in inches.

    `pyplot` is not used, since it keeps figures and chooses a window system.

    Raises:
        [`TranscoderError`]: Matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TranscoderError(
            "A PNG needs matplotlib, which is not installed: pip install 'hf_transcoders[plots]'."
        ) from error
    figure = Figure(figsize=(width, height), layout=layout, dpi=130)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path: str | os.PathLike, **options) -> Path:
    """Write a figure as a PNG file; further arguments as for `Figure.savefig`."""
    path = Path(path)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", **options)
    return path


def legend_name(name: str) -> str:
    """Escape a name for legends of matplotlib, where `$` starts a formula and a leading `_` hides the entry."""
    return name.replace("$", r"\$").lstrip("_")


def sparsity_fidelity_png(report: EvaluationReport, path: str | os.PathLike) -> Path:
    """
    Plot FVU and recovered loss of dictionaries over L0, as a PNG file.

    Args:
        report ([`EvaluationReport`]): Evaluation to plot.
        path (`str` or `os.PathLike`): File to write.

    Returns:
        `Path`: Path of the file.
    """
    figure = new_figure(9, 3.8)
    axes = figure.subplots(1, 2)
    for axis, metric, label in (
        (axes[0], "fvu", "FVU (lower is better)"),
        (axes[1], "ce_recovered_zero", "CE recovered (higher is better)"),
    ):
        for number, (name, entry) in enumerate(report.dictionaries.items()):
            metrics = entry["metrics"]
            axis.scatter(
                [metrics["l0"]],
                [metrics[metric]],
                s=60,
                color=COLORS[number % len(COLORS)],
                label=legend_name(name),
            )
        axis.set_xlabel(L0_LABEL)
        axis.set_ylabel(label)
        # At least from 0 to 1; dictionaries worse than ablation exceed it.
        low, high = axis.get_ylim()
        axis.set_ylim(min(-0.05, low), max(1.05, high))
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    if len(report.dictionaries) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return save_figure(figure, path, dpi=110)
