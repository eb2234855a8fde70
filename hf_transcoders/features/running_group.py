"""Keep the best examples of every feature in fixed memory, while text streams by."""

from dataclasses import dataclass

import torch

from .text_sample import TextSample


# Columns whose examples are merged at once: bounds the memory of a merge.
_SOME_COLUMNS = 4096


def window_start(positions: torch.Tensor, lengths: torch.Tensor, window: int) -> torch.Tensor:
    """The first position of the window of each example, which has the position in its middle unless the row ends there."""
    return torch.minimum(positions - window // 2, lengths - window).clamp(min=0)


@dataclass
class ActivationPart:
    """Activations of some blocks of text.

    Args:
        activations (`torch.Tensor` of shape `(blocks, seq, features)`): Activations, 0 on tokens that do not count.
        numbers (`torch.LongTensor` of shape `(blocks,)`): Number of each block.
        lengths (`torch.LongTensor` of shape `(blocks,)`): Number of tokens of each block.
    """

    activations: torch.Tensor
    numbers: torch.Tensor
    lengths: torch.Tensor

    def windows(self, blocks, positions, features, window):
        """Activations `(examples, window)` around positions, 0 beyond the end of a block; arguments `(examples,)`."""
        start = window_start(positions, self.lengths[blocks], window)
        places = start[:, None] + torch.arange(window, device=start.device)
        inside = places < self.lengths[blocks][:, None]
        places = places.clamp(max=self.activations.shape[1] - 1)
        return self.activations[blocks[:, None], places, features[:, None]] * inside


class RunningGroup:
    """The examples with the highest scores of every column so far, one of each context and document.

    A column is a feature, or one interval of its activations.

    Args:
        columns (`int`): Number of columns.
        size (`int`): Number of examples of a column.
        window (`int`): Number of tokens of an example whose activations are kept; 0 keeps none.
        sample ([`TextSample`]): The text, to tell contexts and documents apart.
        device (`torch.device`): Device of the activations.
        columns_per_feature (`int`, *optional*, defaults to 1): Number of columns of each feature.
    """

    def __init__(
        self,
        columns: int,
        size: int,
        window: int,
        sample: TextSample,
        device: torch.device,
        columns_per_feature: int = 1,
    ):
        self.columns_per_feature = columns_per_feature
        self.contexts = None if sample.contexts is None else sample.contexts.to(device)
        self.documents = None if sample.documents is None else sample.documents.to(device)
        self.scores = torch.zeros(columns, size, device=device)
        self.values = torch.zeros(columns, size, device=device)
        self.rows = torch.zeros(columns, size, dtype=torch.int32, device=device)
        self.positions = torch.zeros(columns, size, dtype=torch.int32, device=device)
        # Shares of `values`, whose precision in half is the same for activations of any size.
        self.windows = torch.zeros(columns, size, window, dtype=torch.float16, device=device)

    #: Names of the tensors that are its state.
    STATE = ("scores", "values", "rows", "positions", "windows")

    def offer(
        self,
        scores: torch.Tensor,
        values: torch.Tensor,
        blocks: torch.Tensor,
        positions: torch.Tensor,
        part: ActivationPart,
    ) -> None:
        """Take in examples where they have higher scores than those that are kept.

        Args:
            scores, values, blocks, positions (`torch.Tensor` of shape `(columns, examples)`): Score, activation, place in the
                part, and position of each example. A score of 0 is none.
            part ([`ActivationPart`]): Their activations.
        """
        gains = (scores.amax(1) > self.scores[:, -1]).nonzero()[:, 0]
        for columns in gains.split(_SOME_COLUMNS):
            self._merge(columns, scores[columns], values[columns], blocks[columns], positions[columns], part)

    def _merge(self, columns, scores, values, blocks, positions, part):
        rows, positions = part.numbers[blocks].int(), positions.int()
        old = {name: getattr(self, name)[columns] for name in ("scores", "values", "rows", "positions")}
        repeats = _repeats(self, old, scores, rows, positions)
        merged = torch.cat([old["scores"], scores], 1).masked_fill(repeats, 0)
        merged, order = merged.sort(dim=1, descending=True, stable=True)
        size = self.scores.shape[1]
        merged, order = merged[:, :size], order[:, :size]
        stays = merged > 0
        for name, new in (("values", values), ("rows", rows), ("positions", positions)):
            getattr(self, name)[columns] = torch.cat([old[name], new], 1).gather(1, order) * stays
        self.scores[columns] = merged
        if not self.windows.shape[-1]:
            return
        kept = self.windows[columns[:, None], order.clamp(max=size - 1)] * stays[..., None]
        column, place = ((order >= size) & stays).nonzero(as_tuple=True)
        chosen = order[column, place] - size
        windows = part.windows(
            blocks[column, chosen],
            positions[column, chosen].long(),
            columns[column] // self.columns_per_feature,
            self.windows.shape[-1],
        )
        # A random activation can be tiny beside its neighbors.
        shares = (windows / values[column, chosen][:, None]).clamp(max=torch.finfo(kept.dtype).max)
        kept[column, place] = shares.to(kept.dtype)
        self.windows[columns] = kept

    def halve(self, features: torch.Tensor) -> None:
        """Merge the columns of some features in pairs, as the intervals of their activations double."""
        per = self.columns_per_feature
        columns = features[:, None] * per + torch.arange(per, device=features.device)
        size = self.scores.shape[1]
        pairs = {name: getattr(self, name)[columns] for name in self.STATE}
        pairs = {name: tensor.reshape(-1, 2 * size, *tensor.shape[3:]) for name, tensor in pairs.items()}
        empty = {name: tensor[:, :0] for name, tensor in pairs.items()}
        repeats = _repeats(self, empty, *(pairs[name] for name in ("scores", "rows", "positions")))
        scores, order = pairs["scores"].masked_fill(repeats, 0).sort(dim=1, descending=True, stable=True)
        order, stays = order[:, :size], scores[:, :size] > 0
        for name, tensor in pairs.items():
            index, mask = (order, stays) if tensor.dim() == 2 else (order[..., None], stays[..., None])
            source = scores if name == "scores" else tensor.gather(1, index.expand(-1, -1, *tensor.shape[2:]))
            merged = (source[:, :size] * mask).view(len(features), per // 2, *getattr(self, name).shape[1:])
            state = getattr(self, name)
            state[columns] = torch.cat([merged, torch.zeros_like(merged)], 1)


def _repeats(group, old, scores, rows, positions):
    """Which of the examples of each column, the kept ones and then the new ones, have the context or the document of one with
    a higher score; of equal scores, that of an earlier one. The kept ones are known to differ."""
    kept = old["scores"].shape[1]
    if group.contexts is None:
        return torch.zeros(len(scores), kept + scores.shape[1], dtype=torch.bool, device=scores.device)
    places, kept_places = (rows.long(), positions.long()), (old["rows"].long(), old["positions"].long())
    earlier = torch.ones(scores.shape[1], scores.shape[1], dtype=torch.bool, device=scores.device).tril(-1)
    # `[..., i, j]`: whether the j-th example comes before the i-th.
    before = (scores[:, None, :] > scores[..., None]) | ((scores[:, None, :] == scores[..., None]) & earlier)
    among, across = False, False
    for numbers in (group.contexts, group.documents):
        new, known = numbers[places], numbers[kept_places]
        among = (new[..., None] == new[:, None]) | among
        across = (new[..., None] == known[:, None]) | across
    among = among & before & (scores > 0)[:, None]
    stronger = scores[..., None] > old["scores"][:, None]
    new_repeats = among.any(2) | (across & ~stronger & (old["scores"] > 0)[:, None]).any(2)
    kept_repeats = (across & stronger).any(1)
    return torch.cat([kept_repeats, new_repeats], 1)
