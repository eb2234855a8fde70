"""Keep distinct activations of each feature in one pass: the largest ones, and random ones for quantiles."""

from collections.abc import Iterable

import torch

from ..models.modeling_transcoder import TranscoderModel
from .text_sample import TextSample
from .top_activations import RunningTop


#: Names of the quantiles of the activations on the tokens on which a feature is active, strongest first.
QUANTILES = ("75-100%", "50-75%", "25-50%", "0-25%")

# Random activations that are kept for each feature: four in each quantile.
_KEPT = 16
# Priority, activation, block and position of each.
_DRAWN = (torch.float32, torch.float32, torch.long, torch.long)


class SampledTop(RunningTop):
    """The top activations of some features so far, and random ones, each at most one per block, context and document.

    Memory is fixed for each feature, however long the text is.

    Args:
        features (`Iterable[int]`): Numbers of the features.
        k (`int`): Number of top activations to keep for each of them.
        dictionary ([`TranscoderModel`]): The dictionary.
        sample ([`TextSample`]): The text.
        quantiles (`bool`, *optional*, defaults to `True`): Whether to keep random activations.
    """

    def __init__(
        self, features: Iterable[int], k: int, dictionary: TranscoderModel, sample: TextSample, quantiles: bool = True
    ):
        super().__init__(features, k, dictionary)
        device = dictionary.device
        self.contexts, self.documents = sample.contexts.to(device), sample.documents.to(device)
        self.priorities = sample.priorities.to(device) if quantiles else None
        shape = (_KEPT, len(self.features))
        # The random ones are those with the highest priorities.
        self.drawn = tuple(torch.zeros(shape, dtype=dtype, device=device) for dtype in _DRAWN)

    def update(self, activations, rows):
        super().update(activations, rows)
        if self.priorities is None:
            return
        # The token with the highest priority is a random one of those on which a feature is active.
        priorities = self.priorities[rows.to(self.priorities.device), : activations.shape[1], None]
        priority, positions = priorities.where(activations > 0, 0).max(1)
        values = activations.gather(1, positions.unsqueeze(1))[:, 0]
        rows = rows.to(values.device).unsqueeze(-1).expand_as(positions)
        self.drawn = self._distinct(self.drawn, (priority, values, rows, positions))

    def _keep(self, values, rows, positions):
        kept = self._distinct((self.values, self.rows, self.positions), (values, rows, positions))
        self.values, self.rows, self.positions = kept

    def _distinct(self, kept, new):
        """Merge kept tensors `(kept, features)` with new ones `(blocks, features)`, ordered by the first tensor.

        Of those with one context or document, only the first stays. The last two tensors are blocks and positions.
        """
        # Only features that gain something; after some text these are few.
        gains = (new[0] > kept[0][-1]).any(0).nonzero()[:, 0]
        both = [torch.cat([old[:, gains], more[:, gains]]) for old, more in zip(kept, new, strict=True)]
        order = both[0].argsort(dim=0, descending=True, stable=True)
        both = [tensor.gather(0, order) for tensor in both]
        places = tuple(both[-2:])
        same = torch.zeros(len(order), *order.shape, dtype=torch.bool, device=order.device)
        for numbers in (self.contexts[places], self.documents[places]):
            same |= numbers[:, None] == numbers[None]
        earlier = torch.ones(len(order), len(order), dtype=torch.bool, device=order.device).tril(-1)
        repeats = (same & earlier[..., None] & (both[0] > 0)[None]).any(1)
        order = both[0].masked_fill(repeats, 0).argsort(dim=0, descending=True, stable=True)[: len(kept[0])]
        stays = ~repeats.gather(0, order)
        return tuple(
            old.index_copy(1, gains, tensor.gather(0, order) * stays) for old, tensor in zip(kept, both, strict=True)
        )

    def places(self, number: int, per_quantile: int) -> dict[str | None, list[tuple[int, int]]]:
        """Blocks and positions to show for one of the features.

        Args:
            number (`int`): Index into `features`.
            per_quantile (`int`): Number of places for each quantile.

        Returns:
            `dict[str | None, list[tuple[int, int]]]`: those of the top activations, strongest first, under `None`; and
            those of other random activations by the names of their quantiles, which the random ones stand for.
        """
        top = zip(*(tensor[:, number].tolist() for tensor in (self.values, self.rows, self.positions)), strict=True)
        found: dict[str | None, list[tuple[int, int]]] = {None: [(row, at) for value, row, at in top if value > 0]}
        if self.priorities is None or not per_quantile:
            return found
        drawn = zip(*(tensor[:, number].tolist() for tensor in self.drawn[1:]), strict=True)
        drawn = sorted((value, row, at) for value, row, at in drawn if value > 0)[::-1]
        for quantile, name in enumerate(QUANTILES):
            ends = [len(drawn) * (quantile + side) // len(QUANTILES) for side in (0, 1)]
            its = [each for each in drawn[ends[0] : ends[1]] if each[1:] not in found[None]]
            count = min(per_quantile, len(its))
            # From the middle of equal parts.
            its = [its[(2 * i + 1) * len(its) // (2 * count)] for i in range(count)]
            if its:
                found[name] = [(row, at) for _, row, at in its]
        return found
