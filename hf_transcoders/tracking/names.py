"""
The names of what is recorded, and what other libraries call the same.

A log of [`TranscoderTrainer`] becomes `train/<name>`, an evaluation `eval/<name>`; metrics of a dictionary have
`<dictionary>/` before their own name, as in `train/layers.8.mlp.transcoder/fvu`. These names are stable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MetricName:
    """
    One recorded number.

    Args:
        name (`str`): Without `train/` and the dictionary.
        meaning (`str`): What it is; sums and means run over the tokens since the last log.
        aliases (`dict[str, str]`): Library -> its name, where the definition is the same.
        differs (`str`): Which similar number elsewhere is *not* the same, and why.
    """

    name: str
    meaning: str
    aliases: dict[str, str] = field(default_factory=dict)
    differs: str = ""


#: Of each dictionary, in training.
DICTIONARY_METRICS = (
    MetricName(
        "fvu",
        "Fraction of variance unexplained: sum of squared errors over the sum of squared deviations of the targets from "
        "their mean.",
        {"sparsify": "fvu/{dictionary}"},
        "sparsify takes the ratio in each batch and averages, here the sums are divided once per log.",
    ),
    MetricName(
        "explained_variance",
        "1 - fvu.",
        {"saelens": "metrics/explained_variance"},
        "dictionary_learning's `frac_variance_explained` centres the errors too, so a constant error does not count; "
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
        differs="Every library scales its reconstruction error in another way (see `loss_reduction`).",
    ),
    MetricName("reconstruction_loss", "The scaled squared error that is trained on (see `loss_reduction`)."),
    MetricName(
        "auxk_loss",
        "What dead features fail to explain of the residual, times `auxk_coefficient`.",
        differs="sparsify's `auxk` is not weighted by its coefficient and is divided by the variance of the targets.",
    ),
    MetricName("l1_loss", "The L1 penalty, with its coefficient and warm-up."),
    MetricName("l0_loss", "The L0 penalty, with its coefficient and warm-up."),
    MetricName("gate_loss", "What the gates alone would get wrong, for gated dictionaries."),
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

#: Of the run.
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
    "train/<dictionary>/log10_feature_density": "Histogram over features of log10 of the share of tokens they fire on.",
    "train/<dictionary>/pre_activations": "Histogram of encoder outputs before the activation, on a sample of tokens.",
    "features/<dictionary>": "Table: features from frequent to rare, where they fire most, which tokens they promote.",
    "sparsity_fidelity": "Image: FVU and recovered loss of every dictionary over L0, of the last evaluation.",
    "report": "Page: training curves, all metrics of the last evaluation, features with their contexts.",
}

#: Libraries whose names can be logged beside ours.
ALIASED = ("saelens", "sparsify", "dictionary_learning")


def aliases(values: Mapping[str, float], library: str, dictionaries: Sequence[str]) -> dict[str, float]:
    """
    The numbers of a training log that another library has too, under its names.

    Args:
        values (`Mapping[str, float]`): Under our names, with `train/`.
        library (`str`): One of `ALIASED`.
        dictionaries (`Sequence[str]`):
            Names of all dictionaries of the run. sae-lens and dictionary_learning have one to a run, so with several the
            dictionary's name stands before theirs.

    Returns:
        `dict[str, float]`: by the other names.
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
