"""HTML report of a run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.evaluation_report import METRICS, TOGETHER, EvaluationReport, format_number
from ..features.feature_examples import FeatureExplanation
from ..files import write_text
from . import plots
from .html import page_templates, present


#: Metric -> its meaning, for readers of the page.
MEANINGS = {
    "l0": "Mean number of active features per token.",
    "l1": "Mean over tokens of the sum of feature activations.",
    "mse": "Mean squared error over all elements.",
    "normalized_mse": "Squared error over the squared norm of the targets.",
    "fvu": "Fraction of variance unexplained: squared error over the variance of the targets. 0 is perfect, 1 is no "
    "better than the mean.",
    "explained_variance": "One minus FVU.",
    "cosine": "Mean cosine similarity of target and reconstruction over tokens.",
    "l2_ratio": "Mean ratio of the norms of reconstruction and target over tokens. Below 1: shrinkage.",
    "relative_reconstruction_bias": "Squared norm of the reconstructions over their inner product with the targets. 1 is "
    "unbiased.",
    "ce_original": "Cross-entropy of the unchanged model, in nats per token.",
    "ce_spliced": "Cross-entropy with the reconstruction in place of the output.",
    "ce_zero_ablated": "Cross-entropy with the output set to zero.",
    "ce_mean_ablated": "Cross-entropy with the output set to its mean.",
    "ce_recovered_zero": "Share of the loss increase of zero-ablation that the dictionary avoids. 1 is perfect.",
    "ce_recovered_mean": "Share of the loss increase of mean-ablation that the dictionary avoids. The stricter of the two.",
    "kl": "KL divergence from the predictions of the unchanged model, in nats per token.",
    "kl_zero_ablated": "KL divergence with the output set to zero.",
    "kl_mean_ablated": "KL divergence with the output set to its mean.",
    "top1_agreement": "Share of tokens with the same most likely next token.",
    "top1_agreement_zero_ablated": "Top-1 agreement with the output set to zero.",
    "top1_agreement_mean_ablated": "Top-1 agreement with the output set to its mean.",
    "dead_fraction": "Share of features that are never active on the tokens seen; it falls with more tokens.",
}

_CURVES = (
    ("fvu", "Reconstruction error", "FVU"),
    ("loss", "Loss", "loss"),
    ("l0", "Active features per token", "L0"),
    ("dead_fraction", "Dead features", "dead fraction"),
)


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    history: Sequence[Mapping[str, float]] | None = None,
    report: EvaluationReport | None = None,
    features: Mapping[str, Sequence[FeatureExplanation]] | Sequence[FeatureExplanation] | None = None,
    info: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of a run as one self-contained HTML file, without scripts and without requests to the network.

    Args:
        path (`str` or `os.PathLike`):
            File to write.
        title, history, report, features, info:
            As for [`render_report`].

    Returns:
        `Path`: Path of the file.
    """
    html = render_report(title=title, history=history, report=report, features=features, info=info)
    return write_text(path, html)


def render_report(
    *,
    title: str,
    history: Sequence[Mapping[str, float]] | None = None,
    report: EvaluationReport | None = None,
    features: Mapping[str, Sequence[FeatureExplanation]] | Sequence[FeatureExplanation] | None = None,
    info: Mapping[str, Any] | None = None,
) -> str:
    """Render the report of a run as one HTML page.

    Sections without data are left out.

    Args:
        title (`str`):
            Heading of the page.
        history (`Sequence[Mapping[str, float]]`, *optional*):
            `trainer.state.log_history`.
        report ([`EvaluationReport`], *optional*):
            Metrics on held-out text.
        features (`Sequence[FeatureExplanation]` or a mapping from dictionary name to them, *optional*):
            Features to show.
        info (`Mapping[str, Any]`, *optional*):
            Facts for the top of the page, such as the training time.

    Returns:
        `str`: HTML.
    """
    history = history or []
    names = list(report.dictionaries) if report else []
    if features and not isinstance(features, Mapping):
        features = {names[0] if len(names) == 1 else "": features}
    return (
        page_templates()
        .get_template("report.html")
        .render(
            title=title,
            info=info or {},
            report=report,
            cards=_cards(report) if report else [],
            fidelity_plots=_fidelity_plots(report) if report else [],
            training_plots=present(plots.loss_curves(history, *curve, names=names) for curve in _CURVES),
            metrics=METRICS,
            meanings=MEANINGS,
            features=features or {},
        )
    )


def _cards(report):
    cards = []
    for name, entry in report.dictionaries.items():
        metrics, config = entry["metrics"], entry["config"]
        cards.append(
            {
                "name": name,
                "sites": f"{config['input_site']} → {config['output_site']}",
                "facts": [
                    ("variance explained", _percent(metrics["explained_variance"])),
                    ("loss recovered", _percent(metrics["ce_recovered_zero"])),
                    (f"of {config['num_features']:,} features active", f"{metrics['l0']:.4g}"),
                    ("of features dead", _percent(metrics["dead_fraction"])),
                ],
            }
        )
    if report.together is not None:
        cards.append(
            {
                "name": TOGETHER,
                "sites": f"{len(report.dictionaries)} dictionaries spliced in at once",
                "facts": [
                    ("loss recovered", _percent(report.together["ce_recovered_zero"])),
                    ("same top prediction", _percent(report.together["top1_agreement"])),
                    ("KL to the original", format_number(report.together["kl"])),
                    ("more loss than the original", f"{_loss_increase(report.together):+.3f}"),
                ],
            }
        )
    return cards


def _loss_increase(metrics):
    return metrics["ce_spliced"] - metrics["ce_original"]


def _fidelity_plots(report):
    return present(
        [
            plots.sparsity_fidelity(report, "fvu", "Reconstruction error (lower is better)", "FVU"),
            plots.sparsity_fidelity(
                report, "ce_recovered_zero", "Loss recovered (higher is better)", "CE recovered (zero)"
            ),
            plots.density_histogram(report),
        ]
    )


def _percent(value):
    return f"{value:.1%}" if value == value else "-"
