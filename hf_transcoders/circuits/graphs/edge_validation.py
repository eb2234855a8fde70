"""Predicted and measured effects of ablated features, and how well they agree."""

from dataclasses import dataclass
from typing import Any

import torch

from ...evaluation.rank_correlation import ranks


#: Modes of an intervention -> the part of the model that is held fixed, for tables.
HELD_FIXED = {"direct": "all but the direct effect", "frozen": "attention and norms", "free": "nothing"}


@dataclass(frozen=True)
class EdgeValidation:
    """Predicted and measured changes of nodes when another node is ablated.

    Args:
        source, target (`torch.LongTensor` of shape `(edges,)`):
            Nodes of the graph. The source, a feature, is ablated.
        depth (`torch.LongTensor` of shape `(edges,)`):
            Layers between them.
        predicted (`torch.Tensor` of shape `(edges,)`):
            Minus the weight of the edge.
        measured (`dict[str, torch.Tensor]`):
            Change of the target's pre-activation, `(edges,)`, by mode of [`intervene`]: `direct` holds everything but the
            direct effect fixed, so that prediction and measurement are equal up to rounding; `frozen` lets MLPs respond;
            `free` lets the whole model respond.
        labels (`list[tuple[str, str]]`):
            Labels of source and target of each edge.
    """

    source: torch.Tensor
    target: torch.Tensor
    depth: torch.Tensor
    predicted: torch.Tensor
    measured: dict[str, torch.Tensor]
    labels: list[tuple[str, str]]

    def summary(self) -> dict[str, dict[str, Any]]:
        """Agreement of prediction and measurement in each mode.

        Returns:
            `dict[str, dict]`: for each mode `pearson` and `spearman` correlation, `sign_agreement`, `relative_error` (norm of
            the difference over norm of the prediction), and the last two for each depth in `by_depth`.
        """
        found = {}
        for mode, measured in self.measured.items():
            found[mode] = {
                "edges": len(measured),
                "pearson": _correlation(self.predicted, measured),
                "spearman": _correlation(ranks(self.predicted), ranks(measured)),
                **_agreement(self.predicted, measured),
                "by_depth": {
                    depth: {"edges": int(at.sum()), **_agreement(self.predicted[at], measured[at])}
                    for depth in self.depth.unique().tolist()
                    for at in [self.depth == depth]
                },
            }
        return found

    def to_dict(self) -> dict[str, Any]:
        """The summary and all edges as plain values."""
        return {
            "summary": self.summary(),
            "edges": [
                {
                    "source": int(self.source[edge]),
                    "target": int(self.target[edge]),
                    "source_label": self.labels[edge][0],
                    "target_label": self.labels[edge][1],
                    "depth": int(self.depth[edge]),
                    "predicted": float(self.predicted[edge]),
                    **{mode: float(values[edge]) for mode, values in self.measured.items()},
                }
                for edge in range(len(self.predicted))
            ],
        }

    def to_text(self) -> str:
        """The summary as a table for the terminal."""
        summary = self.summary()
        lines = [f"{'held fixed':26}{'edges':>6}{'Pearson':>9}{'Spearman':>10}{'same sign':>11}{'error':>10}"]
        for mode, entry in summary.items():
            lines.append(
                f"{HELD_FIXED[mode]:26}{entry['edges']:6}{entry['pearson']:9.3f}{entry['spearman']:10.3f}"
                f"{entry['sign_agreement']:11.1%}{entry['relative_error']:10.2g}"
            )
        depths = summary.get("free", {}).get("by_depth", {})
        if depths:
            cells = ", ".join(
                f"{depth}: {entry['relative_error']:.2g} ({entry['edges']})" for depth, entry in depths.items()
            )
            lines.append(f"error by number of layers between, nothing held fixed: {cells}")
        return "\n".join(lines)

    __str__ = to_text


def _agreement(predicted, measured):
    return {
        "sign_agreement": (predicted.sign() == measured.sign()).double().mean().item(),
        "relative_error": ((measured - predicted).norm() / predicted.norm().clamp(min=1e-30)).item(),
    }


def _correlation(a, b):
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = a.norm() * b.norm()
    return (a @ b / scale).item() if scale > 0 else float("nan")
