"""
Names of recorded metrics, and the names of the same metrics in other libraries.

A log of [`TranscoderTrainer`] is recorded as `train/<name>` and an evaluation as `eval/<name>`; metrics of a dictionary are
prefixed with `<dictionary>/`, as in `train/layers.8.mlp.transcoder/fvu`. These names are stable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MetricName:
    """
    Description of a recorded metric.

    Args:
        name (`str`): Name without `train/` and the dictionary.
        meaning (`str`): Definition; sums and means are over the tokens since the last log.
        aliases (`dict[str, str]`): Library -> its name for a metric with the same definition.
        differs (`str`): Similar metrics of other libraries with *another* definition.
    """

    name: str
    meaning: str
    aliases: dict[str, str] = field(default_factory=dict)
    differs: str = ""


#: Metrics of each dictionary in training.
DICTIONARY_METRICS = (
    MetricName(
        "fvu",
        "Fraction of variance unexplained: sum of squared errors over the sum of squared deviations of the targets from "
        "their mean.",
        {"sparsify": "fvu/{dictionary}"},
        "sparsify averages the ratios of batches; here sums are divided once per log.",
    ),
    MetricName(
        "explained_variance",
        "1 - fvu.",
        {"saelens": "metrics/explained_variance"},
        "dictionary_learning's `frac_variance_explained` centers the errors too, so a constant error does not count; "
        "sae-lens's `explained_variance_legacy` is a mean over tokens of each token's own ratio.",
    ),
    MetricName(
        "l0",
        "Features that are not zero, mean over tokens.",
        {"saelens": "metrics/l0", "dictionary_learning": "l0"},
    ),
    MetricName(
        "l1",
        "Sum of the feature activations, mean over tokens.",
        differs="sae-lens's `losses/l1_loss` is weighted by coefficient and decoder norms.",
    ),
    MetricName(
        "mse",
        "Squared error, mean over tokens and dimensions.",
        differs="sae-lens's `losses/mse_loss` sums over dimensions, dictionary_learning's `l2_loss` is a mean of norms.",
    ),
    MetricName(
        "loss",
        "The dictionary's part of the training loss, with all penalties.",
        differs="Libraries scale the reconstruction error differently (see `loss_reduction`).",
    ),
    MetricName("reconstruction_loss", "The scaled squared error in the training loss (see `loss_reduction`)."),
    MetricName(
        "auxk_loss",
        "Error of the residual's reconstruction by dead features, times `auxk_coefficient`.",
        differs="sparsify's `auxk` is not weighted by its coefficient and is divided by the variance of the targets.",
    ),
    MetricName("l1_loss", "The L1 penalty, with its coefficient and warm-up."),
    MetricName("l0_loss", "The L0 penalty, with its coefficient and warm-up."),
    MetricName("gate_loss", "Reconstruction error of the gates alone, for gated dictionaries."),
    MetricName(
        "shrinkage",
        "Relative reconstruction bias: squared norm of the reconstructions over their product with the targets; 1 is "
        "unbiased.",
    ),
    MetricName(
        "dead_fraction",
        "Share of features that have not fired for `dead_after_tokens`.",
        {"sparsify": "dead_pct/{dictionary}"},
        "Equal to sparsify's for the same window (its `dead_pct` is a share as well); `dead_features` of sae-lens and "
        "dictionary_learning are counts, sae-lens's within steps.",
    ),
    MetricName("grad_norm", "Norm of the dictionary's gradient before clipping, mean over steps."),
)

#: Metrics of the run.
RUN_METRICS = (
    MetricName("loss", "Sum over dictionaries."),
    MetricName("learning_rate", "At this step.", {"saelens": "details/current_learning_rate"}),
    MetricName("grad_norm", "Over all dictionaries, before clipping, at this step."),
    MetricName("epoch", "Passes over the text."),
    MetricName("tokens", "Activations trained on, over all processes.", {"saelens": "details/n_training_samples"}),
    MetricName("tokens_per_second", "Since the last log, over all processes."),
)

#: What [`TranscoderTrackingCallback`] records besides numbers.
RICH_RECORDS = {
    "train/<dictionary>/log10_feature_density": "Histogram over features of log10 of the share of tokens on which they are active.",
    "train/<dictionary>/pre_activations": "Histogram of encoder outputs before the activation, on a sample of tokens.",
    "features/<dictionary>": "Table: features from frequent to rare, with the contexts of their top activations and their promoted tokens.",
    "sparsity_fidelity": "Image: FVU and recovered loss of every dictionary over L0, of the last evaluation.",
    "report": "Page: training curves, all metrics of the last evaluation, features with their contexts.",
}

#: Libraries whose names can be logged in addition.
ALIASED = ("saelens", "sparsify", "dictionary_learning")


def aliases(values: Mapping[str, float], library: str, dictionaries: Sequence[str]) -> dict[str, float]:
    """
    Returns the metrics of a training log under the names of another library.

    Args:
        values (`Mapping[str, float]`): Metrics by name, with `train/`.
        library (`str`): One of `ALIASED`.
        dictionaries (`Sequence[str]`):
            Names of all dictionaries of the run. Runs of sae-lens and dictionary_learning have one dictionary, so with
            several the names are prefixed with that of the dictionary.

    Returns:
        `dict[str, float]`: metrics by name in the other library.
    """
    found = {}
    for metric in RUN_METRICS:
        if library in metric.aliases and f"train/{metric.name}" in values:
            found[metric.aliases[library]] = values[f"train/{metric.name}"]
    for dictionary in dictionaries:
        for metric in DICTIONARY_METRICS:
            ours = f"train/{dictionary}/{metric.name}"
            if library not in metric.aliases or ours not in values:
                continue
            alias = metric.aliases[library]
            if "{dictionary}" in alias:
                alias = alias.format(dictionary=dictionary)
            elif len(dictionaries) > 1:
                alias = f"{dictionary}/{alias}"
            found[alias] = values[ours]
    return found
