"""Overlap of the strongest heads of two tasks, against chance."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...circuits.patching.results import PatchResult, bootstrap_weights
from ...errors import TranscoderError
from .stages import head_count, top_mask


@dataclass(frozen=True)
class Overlap:
    """Overlap of the heads of two tasks at one threshold, over all stages.

    Args:
        share (`float`): Threshold: the share of heads that count as strongest in each stage.
        count (`int`): The threshold as a number of heads.
        shared (`int`): Number of heads among the strongest of both tasks, summed over stages.
        possible (`int`): Largest possible number of shared heads.
        fraction (`float`): `shared / possible`.
        low, high (`float`): Bootstrap interval of the fraction. Prompts of both tasks are resampled; receivers are kept.
        null (`float`): Mean fraction with shuffled heads.
        null_high (`float`): 95th percentile of the fraction with shuffled heads.
        p_value (`float`): Share of shuffles with at least this overlap, with one added to both counts.
        layer_null, layer_p_value (`float`): Mean fraction and p-value with heads shuffled only within their layer.
        by_stage (`dict[str, int]`): Number of shared heads in each stage.
    """

    share: float
    count: int
    shared: int
    possible: int
    fraction: float
    low: float
    high: float
    null: float
    null_high: float
    p_value: float
    layer_null: float
    layer_p_value: float
    by_stage: dict[str, int]


def overlaps(
    first: dict[str, PatchResult],
    second: dict[str, PatchResult],
    shares: Sequence[float] = (0.01, 0.02, 0.05, 0.10),
    permutations: int = 5000,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Overlap]:
    """Measure the overlap of the strongest heads of two tasks.

    Only heads with an effect in both tasks are shuffled, because heads above the receivers of a stage cannot be chosen.

    Args:
        first, second (`dict[str, PatchResult]`):
            Results of the stages of each task, with the axes `layer` and `head`. Stages of only one task are left out.
        shares (`Sequence[float]`, *optional*, defaults to `(0.01, 0.02, 0.05, 0.10)`):
            Thresholds: shares of heads that count as strongest, by magnitude.
        permutations (`int`, *optional*, defaults to 5000):
            Number of shuffles for each null distribution.
        resamples (`int`, *optional*, defaults to 1000):
            Number of resamples for the interval.
        seed (`int`, *optional*, defaults to 0):
            Seed for the shuffles and the resamples.

    Returns:
        `list[Overlap]`: one overlap for each threshold.
    """
    stages = [name for name in first if name in second]
    if not stages:
        raise TranscoderError("The two tasks have no stage in common: trace both starting from the logits.")
    generator = torch.Generator().manual_seed(seed)
    effects = [[task[name].effects.flatten() for name in stages] for task in (first, second)]
    layers, heads = first[stages[0]].shape
    shuffled = {kind: _shuffled(effects, heads, permutations, generator, kind) for kind in ("all", "layer")}
    drawn = [_drawn([task[name] for name in stages], resamples, generator) for task in (first, second)]

    found = []
    for share in shares:
        count = head_count(share, layers * heads)
        tops = [[top_mask(each[:, None], count) for each in task] for task in effects]
        by_stage = [int((one & other).sum()) for one, other in zip(*tops, strict=True)]
        possible = count * len(stages)
        nulls = {
            kind: sum(
                (one & top_mask(each, count)).sum(0) for one, each in zip(tops[0], shuffled[kind], strict=True)
            ).double()  # pyright: ignore[reportAttributeAccessIssue]
            for kind in shuffled
        }
        again = sum((top_mask(one, count) & top_mask(other, count)).sum(0) for one, other in zip(*drawn, strict=True))
        low, high = (again / possible).double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()  # pyright: ignore[reportAttributeAccessIssue]
        shared = sum(by_stage)
        found.append(
            Overlap(
                share=share,
                count=count,
                shared=shared,
                possible=possible,
                fraction=shared / possible,
                low=low,
                high=high,
                null=nulls["all"].mean().item() / possible,
                null_high=nulls["all"].quantile(0.95).item() / possible,
                p_value=_p_value(nulls["all"], shared),
                layer_null=nulls["layer"].mean().item() / possible,
                layer_p_value=_p_value(nulls["layer"], shared),
                by_stage=dict(zip(stages, by_stage, strict=True)),
            )
        )
    return found


def _shuffled(effects, heads, permutations, generator, kind):
    """Effects of the second task with shuffled heads, `(heads, permutations)` for each stage."""
    stages = []
    for one, other in zip(*effects, strict=True):
        movable = (one != 0) & (other != 0)
        places = movable.nonzero()[:, 0]
        keys = torch.rand(len(places), permutations, generator=generator)
        if kind == "layer":
            # Sorted by layer first, so that each head stays in its layer.
            keys = keys + (places // heads)[:, None]
        order = keys.argsort(dim=0)
        shuffled = other[:, None].repeat(1, permutations)
        shuffled[places] = other[places][order]
        stages.append(shuffled)
    return stages


def _drawn(results, resamples, generator):
    """Effects of one task on resampled prompts, `(heads, resamples)` for each stage; all stages share the resamples."""
    weights = bootstrap_weights(len(results[0].base), resamples, generator)
    found = []
    for result in results:
        change = (result.values.double() - result.base.double()).flatten(0, 1) @ weights.T
        found.append(change / (weights @ (result.source.double() - result.base.double())))
    return found


def _p_value(null, shared):
    return (1 + (null >= shared).sum().item()) / (1 + len(null))
