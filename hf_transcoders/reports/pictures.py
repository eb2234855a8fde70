"""Pictures as PNG, for trackers that show images."""

import os
from pathlib import Path

from ..errors import TranscoderError
from ..evaluation.evaluation_report import EvaluationReport
from ..files import atomic_file
from .plots import COLOURS, L0_LABEL


def new_figure(width: float, height: float):
    """An empty `matplotlib.figure.Figure`, in inches, that needs no display.

    Raises:
        [`TranscoderError`]: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TranscoderError(
            "A PNG needs matplotlib, which is not installed: pip install 'hf_transcoders[plots]'."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    return figure


def sparsity_fidelity_png(report: EvaluationReport, path: str | os.PathLike) -> Path:
    """
    Where dictionaries stand between few active features and good reconstruction: FVU, and recovered loss, over L0.

    Args:
        report ([`EvaluationReport`]): The numbers.
        path (`str` or `os.PathLike`): The file to write.

    Returns:
        `Path`: the file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, metric, label in (
        (axes[0], "fvu", "FVU (lower is better)"),
        (axes[1], "ce_recovered_zero", "CE recovered (higher is better)"),
    ):
        for number, (name, entry) in enumerate(report.dictionaries.items()):
            metrics = entry["metrics"]
            # Names are data: a `$` in one must not start a formula, nor a `_` keep it from the legend.
            axis.scatter(
                [metrics["l0"]],
                [metrics[metric]],
                s=60,
                color=COLOURS[number % len(COLOURS)],
                label=name.replace("$", r"\$").lstrip("_"),
            )
        axis.set_xlabel(L0_LABEL)
        axis.set_ylabel(label)
        # From 0 to 1, and further where a dictionary is worse than nothing.
        low, high = axis.get_ylim()
        axis.set_ylim(min(-0.05, low), max(1.05, high))
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    if len(report.dictionaries) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    path = Path(path)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    return path
