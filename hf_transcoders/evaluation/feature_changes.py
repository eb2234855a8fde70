"""Statistics of features whose frequency changes when a model is fine-tuned."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


# Features with fewer firings, before and after together, are not judged: the jackknife underestimates the spread of a few
# firings.
MIN_FIRINGS = 20
# Largest change, in nats, of a feature that counts as unchanged: 10%. The same tokens are compared, so far smaller changes
# are significant, and every feature has one after a few steps.
TOLERANCE = 0.1
# Expected share of features that are listed as changed by chance.
FALSE_DISCOVERY_RATE = 0.05


@dataclass
class FeatureChange:
    r"""
    A feature whose firing rate or mean activation has changed.

    Args:
        dictionary (`str`): Name of the dictionary.
        feature (`int`): Number of the feature.
        label (`str`, *optional*): Top activations at the baseline; `None` if it never fired, or without tokenizer.
        rate_before, rate_after (`float`): Share of tokens the feature is active on.
        log_odds_change, log_odds_error (`float`):
            Change in \\(\log \frac{n_{fired} + 1/2}{n_{silent} + 1/2}\\), and its standard error.
        mean_before, mean_after (`float`): Mean activation over the tokens the feature is active on; 0 if it never fires.
        log_mean_change, log_mean_error (`float`):
            Change in the logarithm of that mean, and its standard error; `nan` if the feature does not fire in at least two
            groups of blocks, before and after.
    """

    dictionary: str
    feature: int
    label: str | None
    rate_before: float
    rate_after: float
    log_odds_change: float
    log_odds_error: float
    mean_before: float
    mean_after: float
    log_mean_change: float
    log_mean_error: float

    @property
    def description(self) -> str:
        """The label, or the reason why there is none."""
        return self.label or ("" if self.rate_before else "never fired at the baseline")


class FeatureChanges:
    """Changes of all features of one dictionary with standard errors, each `(num_features,)` in float64."""

    def __init__(self, tokens, fired_before, activation_before, fired_after, activation_after):
        self.tokens = tokens.sum()
        self.before, self.after = (fired_before, activation_before), (fired_after, activation_after)
        self.groups = len(tokens)

        def change(function):
            def difference(select):
                old = function(select(tokens), *(select(sums) for sums in self.before))
                return function(select(tokens), *(select(sums) for sums in self.after)) - old

            whole = difference(lambda sums: sums.sum(0))
            left_out = torch.stack([difference(lambda sums, g=g: sums.sum(0) - sums[g]) for g in range(self.groups)])
            deviation = (left_out - left_out.mean(0)).square().sum(0)
            return whole, (deviation * (self.groups - 1) / self.groups).sqrt()

        self.log_odds, self.log_odds_error = change(_log_odds)
        self.log_mean, self.log_mean_error = change(_log_mean)

    def p_values(self) -> Tensor:
        """P-values `(2, num_features)` of densities and of mean activations; 1 for features that are active too rarely."""
        p_values = torch.stack(
            [
                _p_value(self.log_odds, self.log_odds_error, self.groups),
                _p_value(self.log_mean, self.log_mean_error, self.groups),
            ]
        )
        firings = self.before[0].sum(0) + self.after[0].sum(0)
        return p_values.where(firings >= MIN_FIRINGS, 1.0)

    def sizes(self) -> Tensor:
        """Lower 95% confidence bound of the larger of the two changes `(num_features,)`, in nats."""
        least = [
            change.abs() - 1.96 * error
            for change, error in ((self.log_odds, self.log_odds_error), (self.log_mean, self.log_mean_error))
        ]
        return torch.stack(least).nan_to_num(-math.inf).amax(0)

    def facts(self, feature: int) -> dict[str, float]:
        facts = {}
        for when, (fired, activation) in (("before", self.before), ("after", self.after)):
            fired, activation = fired[:, feature].sum(), activation[:, feature].sum()
            facts[f"rate_{when}"] = (fired / self.tokens).item()
            facts[f"mean_{when}"] = (activation / fired.clamp(min=1)).item()
        for key in ("log_odds", "log_mean"):
            facts[f"{key}_change"] = getattr(self, key)[feature].item()
            facts[f"{key}_error"] = getattr(self, f"{key}_error")[feature].item()
        return facts


def _log_odds(tokens, fired, activation):
    return ((fired + 0.5) / (tokens - fired + 0.5)).log()


def _log_mean(tokens, fired, activation):
    return (activation / fired).log()


def _p_value(change: Tensor, error: Tensor, groups: int) -> Tensor:
    """
    P-value of a change under the hypothesis that the true change is within the tolerance: two-sided, by Student's t with
    `groups - 1` degrees of freedom; 1 if the change itself is within the tolerance, or was not measured.
    """
    freedom = groups - 1
    excess = (change.abs() - TOLERANCE).clamp(min=0)
    square = (excess / error).square().where(excess != 0, 0)
    # Wallace (1959): the normal deviate with the same tail probability as t.
    normal = (freedom * (square / freedom).log1p()).sqrt() * (8 * freedom + 1) / (8 * freedom + 3)
    return torch.special.erfc(normal / math.sqrt(2)).nan_to_num(1.0)


def discoveries(p_values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features with a significant p-value at the false discovery rate (Benjamini and Hochberg 1995)."""
    ordered = torch.cat([values.flatten() for values in p_values.values()]).sort().values
    ranks = torch.arange(1, len(ordered) + 1, dtype=ordered.dtype)
    accepted = ordered[ordered <= ranks * FALSE_DISCOVERY_RATE / len(ordered)]
    threshold = accepted[-1] if len(accepted) else -1.0
    return {name: (values <= threshold).any(0) for name, values in p_values.items()}
