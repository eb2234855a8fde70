"""Remove patches that hardly matter, by ascending thresholds (ACDC on a flat list)."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


# Groups at the start of each threshold, so that few units are tried one by one.
_GROUPS = 16


@dataclass(frozen=True)
class PatchedSet:
    """
    A set of patched units on the way from all of them to few.

    Args:
        kept (`torch.BoolTensor` of shape `(units,)`): The units.
        kl (`float`): Mean KL divergence to the counterfactual.
        threshold (`float`, *optional*): Threshold at which the set was reached; `None` for the set of all units.
    """

    kept: torch.Tensor
    kl: float
    threshold: float | None = None

    @property
    def size(self) -> int:
        """Number of units."""
        return int(self.kept.sum())


def threshold_sweep(
    measure: Callable[[torch.Tensor], torch.Tensor],
    order: torch.Tensor,
    thresholds: Sequence[float],
    group_size: int = 32,
    max_sets: int = 16,
) -> list[PatchedSet]:
    """
    Removes units from the set of all, threshold by threshold.

    At each threshold, groups of at most `group_size` remaining units, and at least 16 groups if there are as many units, are
    visited in order. A group is removed if the KL divergence rises by less than the threshold for each of its units; of those
    that are not, each is split in halves, and these are visited after all groups, down to single units. So a unit that stays
    was tried alone and mattered by at least the threshold. With `group_size=1` this is the algorithm of Conmy et al. (2023) as
    Cunningham et al. (2023) use it, with a test for each unit and threshold; groups remove at once what raises the KL by no
    more than the single tests would have allowed.

    As long as nothing is removed, all tests are of the same set, so they are measured together. Tests that a removal makes
    obsolete are repeated: the result does not depend on `max_sets`.

    Args:
        measure (`Callable`): Returns the KL `(sets,)` of sets `(sets, units)` bool.
        order (`torch.LongTensor` of shape `(units,)`): Units in the order in which they are visited.
        thresholds (`Sequence[float]`): Thresholds, ascending.
        group_size (`int`, *optional*, defaults to 32): Largest number of units that are tried together first.
        max_sets (`int`, *optional*, defaults to 16): Largest number of sets that are measured together.

    Returns:
        `list[PatchedSet]`: all sets on the way, the largest first.
    """
    kept = torch.ones(len(order), dtype=torch.bool)
    current = measure(kept[None])[0].item()
    path = [PatchedSet(kept, current)]
    for threshold in thresholds:
        remaining = order[kept[order]]
        size = min(group_size, max(1, len(remaining) // _GROUPS))
        waiting = deque(remaining.split(size)) if len(remaining) else deque()
        ahead = 1
        while waiting:
            tried = [waiting.popleft() for _ in range(min(ahead, len(waiting)))]
            sets = kept.repeat(len(tried), 1)
            for row, group in zip(sets, tried, strict=True):
                row[group] = False
            found = measure(sets).tolist()
            ahead = min(2 * ahead, max_sets)
            for place, (group, kl) in enumerate(zip(tried, found, strict=True)):
                if kl - current < threshold * len(group):
                    kept, current = sets[place], kl
                    path.append(PatchedSet(kept, kl, threshold))
                    waiting.extendleft(reversed(tried[place + 1 :]))
                    ahead = 1
                    break
                if len(group) > 1:
                    waiting.extend(group.tensor_split(2))
    return path
