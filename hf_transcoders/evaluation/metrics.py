"""Metrics as modules of the `evaluate` library.

Their inputs are sufficient statistics of batches, not activations (which `evaluate` would take seconds to encode), and the
formulas are those of `statistics`:

```python
>>> import evaluate
>>> from hf_transcoders.evaluation import FVU, L0, FeatureStatistics, ReconstructionStatistics, as_batch

>>> metrics = evaluate.combine([L0(), FVU()])
>>> for inputs, targets in batches:
...     output = transcoder(inputs)
...     reconstruction, features = ReconstructionStatistics(d_out), FeatureStatistics(num_features)
...     reconstruction.update(targets, output.reconstruction)
...     features.update(output.features)
...     metrics.add_batch(**as_batch(reconstruction, features))
>>> metrics.compute()
{'l0': 64.0, 'fvu': 0.21}
```
"""

from typing import TypeVar

import datasets
import evaluate
import torch

from .statistics import (
    FeatureStatistics,
    LossStatistics,
    ReconstructionStatistics,
    SumStatistics,
    ce_recovered,
    density_histogram,
)


_NUMBER = datasets.Value("float64")
_VECTOR = datasets.Sequence(datasets.Value("float64"))

_INPUTS = """
Args:
    {columns}: sums over the tokens of each batch, one row per batch, as returned by `as_batch`.
"""


def as_batch(*statistics: SumStatistics) -> dict[str, list]:
    """Convert accumulators over the same tokens to one row for `add_batch`.

    Args:
        statistics ([`ReconstructionStatistics`], [`FeatureStatistics`] or [`LossStatistics`]):
            Accumulators of a batch.

    Returns:
        `dict[str, list]`: one column per sum, each with one row.
    """
    return {name: [total.tolist()] for accumulator in statistics for name, total in accumulator.sums.items()}


_Statistics = TypeVar("_Statistics", bound=SumStatistics)


class _Metric(evaluate.Metric):
    """A metric over columns of sums: `columns` are summed over batches and passed to `result` as tensors."""

    columns: dict[str, datasets.Value | datasets.Sequence]

    def _info(self):
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description=_INPUTS.format(columns=", ".join(self.columns)),
            features=datasets.Features(self.columns),
        )

    def _compute(self, **columns):
        return self.result({name: torch.tensor(rows, dtype=torch.float64).sum(0) for name, rows in columns.items()})

    def result(self, sums: dict[str, torch.Tensor]) -> dict:
        raise NotImplementedError


def _restore(statistics: _Statistics, sums: dict[str, torch.Tensor]) -> _Statistics:
    for name, total in sums.items():
        statistics.sums[name] += total
    return statistics


class L0(_Metric):
    """Mean number of features that are not zero, per token."""

    columns = {"tokens": _NUMBER, "fired": _VECTOR}

    def result(self, sums):
        return {"l0": _restore(FeatureStatistics(len(sums["fired"])), sums).compute()["l0"]}


class DeadFeatures(_Metric):
    """Share of features that were never active, and the number of tokens."""

    columns = {"tokens": _NUMBER, "fired": _VECTOR}

    def result(self, sums):
        statistics = _restore(FeatureStatistics(len(sums["fired"])), sums)
        return {"dead_fraction": statistics.compute()["dead_fraction"], "dead_fraction_tokens": statistics.tokens}


class FeatureDensity(_Metric):
    """Share of tokens each feature is active on, and a histogram of it over log10."""

    columns = {"tokens": _NUMBER, "fired": _VECTOR}

    def result(self, sums):
        density = _restore(FeatureStatistics(len(sums["fired"])), sums).density()
        return {"density": density.tolist(), "density_histogram": density_histogram(density)}


class FVU(_Metric):
    """Fraction of variance unexplained: squared error over the variance of the targets, over all tokens."""

    columns = {"tokens": _NUMBER, "target": _VECTOR, "target_square": _NUMBER, "error_square": _NUMBER}
    name_of_result = "fvu"

    def result(self, sums):
        statistics = _restore(ReconstructionStatistics(len(sums["target"])), sums)
        return {self.name_of_result: statistics.compute()[self.name_of_result]}


class ExplainedVariance(FVU):
    """One minus the fraction of variance unexplained."""

    name_of_result = "explained_variance"


class LossRecovered(_Metric):
    """Share of the loss increase under ablation that is avoided by splicing in the dictionary.

    The columns are sums over tokens of the cross-entropy of the unchanged model, of the model with the dictionary
    spliced in, and of the ablated model.
    """

    columns = {"ce_original": _NUMBER, "ce_spliced": _NUMBER, "ce_ablated": _NUMBER}

    def result(self, sums):
        return {"ce_recovered": ce_recovered(*(sums[name].item() for name in self.columns))}


class KL(_Metric):
    """Mean KL divergence from the unchanged model's next-token distribution to the changed model's, in nats."""

    columns = {"tokens": _NUMBER, "kl": _NUMBER}

    def result(self, sums):
        return {"kl": _restore(LossStatistics(), sums).compute()["kl"]}
