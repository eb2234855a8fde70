"""HTML page of the drift of a model during fine-tuning."""

from collections.abc import Mapping, Sequence

from ..evaluation.drift import DriftReport
from ..evaluation.evaluation_report import block_lengths
from . import plots
from .html import page_templates, present


def drift_page(
    title: str, history: Sequence[Mapping[str, float]], report: DriftReport, baseline: Mapping[str, float]
) -> str:
    """
    Render the drift so far as one self-contained HTML page, without scripts and without requests to the network.

    Args:
        title (`str`):
            Heading of the page.
        history (`Sequence[Mapping[str, float]]`):
            One entry per measurement, oldest first: `step`, and the metrics by their names without the prefix `probe/`.
        report ([`DriftReport`]):
            Latest measurement.
        baseline (`Mapping[str, float]`):
            Metrics of the baseline, by the same names.

    Returns:
        `str`: HTML.
    """
    names = list(report.dictionaries)
    return (
        page_templates()
        .get_template("drift.html")
        .render(
            title=title,
            info={
                "step": history[-1]["step"],
                "transcoders": len(names),
                "probe text": f"{report.protocol['fidelity_tokens']:,} tokens",
            },
            plots=present(_curves(history, names)),
            report=report,
            history=history,
            baseline=baseline,
            protocol=_protocol(report.protocol),
        )
    )


def _curves(history, names):
    yield plots.loss_curves(history, "fvu", "Error of the original transcoders", "FVU", names)
    cross_entropies = {"ce": "unchanged model"}
    cross_entropies |= {f"{name}/ce_spliced": f"{name} spliced in" for name in names}
    cross_entropies |= {"together/ce_spliced": "all spliced in"}
    yield _lines(history, cross_entropies, "Cross-entropy on the probe text", "nats per token")
    yield _lines(history, {"kl": "KL"}, "Distance of the predictions from the baseline", "KL, nats per token")
    yield plots.loss_curves(history, "features_changed", "Features that changed", "share of features", names)
    for metric in sorted({key for entry in history for key in entry if key.startswith("task/")}):
        yield _lines(history, {metric: metric}, metric.removeprefix("task/"), "")


def _lines(history, metrics, title, y_label):
    """A chart with one curve per metric."""
    curves = {
        label: [(entry["step"], entry[metric]) for entry in history if plots.is_finite(entry.get(metric))]
        for metric, label in metrics.items()
    }
    present_curves = {label: points for label, points in curves.items() if points}
    return plots.curves_over(present_curves, title, "optimizer steps", y_label)


def _protocol(protocol):
    return {
        "model": protocol["base_model"] or "unnamed",
        "tokens": f"{protocol['fidelity_tokens']:,} for features and FVU, {protocol['loss_tokens']:,} for cross-entropies, "
        f"{protocol['kl_tokens']:,} for KL",
        "blocks": f"{block_lengths(protocol)} tokens, without the first {protocol['skip_first']}",
        "precision": f"{protocol['dtype']} on {protocol['device']}",
    }
