"""Find the strongest connections between two dictionaries without a matrix of all connections."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .ov_circuits import OVCircuits


# Elements of the largest temporary.
MAX_ELEMENTS = 2**23


@dataclass(frozen=True)
class TopConnections:
    """The strongest connections between the features of two dictionaries, largest magnitude first.

    Args:
        source, target (`str`): The dictionaries.
        layer (`int`, *optional*): Layer of the heads in between.
        source_features, target_features (`list[int]`): The two ends of each.
        heads (`list[int]`, *optional*): The head in between.
        strengths (`list[float]`): Contribution of a unit of the source's activation to the target's pre-activation, up to the
            scales of norms and the attention of the head.
    """

    source: str
    target: str
    layer: int | None
    source_features: list[int]
    target_features: list[int]
    heads: list[int] | None
    strengths: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


def connection_strengths(written: torch.Tensor, read: torch.Tensor, heads: OVCircuits | None) -> torch.Tensor:
    """Strengths between directions.

    Args:
        written (`torch.Tensor` of shape `(sources, hidden)`): Write vectors of the sources.
        read (`torch.Tensor` of shape `(targets, hidden)`): Read vectors of the targets.
        heads ([`OVCircuits`], *optional*): Heads in between; the direct connection without.

    Returns:
        `torch.Tensor`: `(1 or heads, sources, targets)`.
    """
    if heads is None:
        return (written @ read.T)[None]
    return heads.values_of(written) @ heads.outputs_read_by(read).mT


def strongest_pairs(
    written: torch.Tensor, read: torch.Tensor, heads: OVCircuits | None, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `k` strengths of largest magnitude among all pairs.

    Sources are taken a few at a time: with 24,576 features in both dictionaries, all strengths would be 2.4 GB.

    Args:
        written, read, heads: As for [`connection_strengths`].
        k (`int`): Number of pairs.

    Returns:
        `tuple`: heads, sources, targets and strengths, each `(k,)`, largest magnitude first.
    """
    count = 1 if heads is None else len(heads)
    # Once for all parts of the sources.
    read = read[None] if heads is None else heads.outputs_read_by(read)
    size = max(1, MAX_ELEMENTS // (count * read.shape[1]))
    best, places = read.new_empty(0), torch.empty(3, 0, dtype=torch.long, device=read.device)
    for start in range(0, len(written), size):
        part = written[start : start + size]
        strengths = (part[None] if heads is None else heads.values_of(part)) @ read.mT
        flat = strengths.flatten()
        chosen = flat.abs().topk(min(k, len(flat))).indices
        found = torch.stack(torch.unravel_index(chosen, strengths.shape))
        found[1] += start
        best, places = torch.cat([best, flat[chosen]]), torch.cat([places, found], dim=1)
        order = best.abs().topk(min(k, len(best))).indices
        best, places = best[order], places[:, order]
    return *places, best
