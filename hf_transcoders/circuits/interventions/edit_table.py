"""The edits of one dictionary as tensors, and the part of them that applies to one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import TranscoderError
from ...lm.forwards import ForwardTokens
from .feature_edits import FeatureEdit


# The end of a slice without an end.
_NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Entries:
    """Edited activations of one forward pass, one per entry: the new activation is `factor * old + added`.

    Args:
        row, position (`torch.LongTensor` of shape `(n,)`):
            Row of the batch, and position in it, counted from the first token that the model got, padding included.
        column (`torch.LongTensor` of shape `(n,)`): Index of the feature in [`EditTable`]'s `features`.
        factor, added (`torch.FloatTensor` of shape `(n,)`): Factor and summand of the new activation.
    """

    row: torch.Tensor
    position: torch.Tensor
    column: torch.Tensor
    factor: torch.Tensor
    added: torch.Tensor


class EditTable:
    """All edits of one dictionary.

    Args:
        edits (list of `(int, FeatureEdit)`): Each with the number of the list that it came from.
        lists (`int`): Number of lists: 1, or one for each row (or group of consecutive rows) of a batch.

    Attributes:
        features (`torch.LongTensor` of shape `(k,)`): The edited features, each once.
    """

    def __init__(self, edits: Sequence[tuple[int, FeatureEdit]], lists: int):
        self.edits = [edit for _, edit in edits]
        self.lists = lists
        self.list_numbers = torch.tensor([number for number, _ in edits])
        features = torch.tensor([edit.feature for edit in self.edits])
        self.features, self.columns = features.unique(return_inverse=True)
        self.factors = torch.tensor([float(edit.factor) for edit in self.edits])
        self.added = torch.tensor([float(edit.value) if edit.kind in ("set", "steer") else 0.0 for edit in self.edits])
        self._placed = {}

    def entries(self, tokens: ForwardTokens, prompt_length: int) -> Entries:
        """The edits that apply to the tokens of a forward pass.

        Raises:
            [`TranscoderError`]: a position is not in the prompt, the batch does not fit the lists, or two edits change
                one activation.
        """
        if tokens.batch % self.lists:
            raise TranscoderError(
                f"There are {self.lists} lists of edits, one for each row, but the model got {tokens.batch} rows: give it "
                "as many, or give one list for all rows."
            )
        # Rows that belong to one list are neighbors, as `generate` makes them for several answers to one prompt.
        group = tokens.batch // self.lists
        if tokens.real is None:
            edit, position, added = self._within(tokens.start, tokens.length, prompt_length)
            number = self.list_numbers[edit]
            self._refuse_repeats(edit, number, position)
            row = (number[:, None] * group + torch.arange(group)).flatten()
            edit, position, added = (part.repeat_interleave(group) for part in (edit, position, added))
        else:
            rows = [self._within_padded(tokens, prompt_length, row, row // group) for row in range(tokens.batch)]
            row = torch.arange(tokens.batch).repeat_interleave(torch.tensor([len(edit) for edit, _, _ in rows]))
            edit, position, added = (torch.cat(parts) for parts in zip(*rows, strict=True))
            self._refuse_repeats(edit, row, position)
        return Entries(row, position, self.columns[edit], self.factors[edit], added)

    def place(self, prompt_length: int):
        """Positions of the edits for a prompt of a given length.

        Returns:
            `tuple`: of single positions the edit, position and added value, each `(n,)`; of ranges the edit, start, stop
            and step, each `(m,)`.

        Raises:
            [`TranscoderError`]: a position is not in the prompt, or a patch has too few or too many values.
        """
        placed = self._placed.get(prompt_length)
        if placed is None:
            singles, ranges = [], []
            for number, edit in enumerate(self.edits):
                if edit.kind != "patch" and isinstance(edit.position, (slice, str)):
                    ranges.append((number, *_bounds(edit.position, prompt_length)))
                    continue
                positions = _in_prompt(edit, prompt_length)
                added = [self.added[number].item()] * len(positions)
                if edit.kind == "patch":
                    added = torch.as_tensor(edit.value, dtype=torch.float32).tolist()
                    if len(added) != len(positions):
                        raise TranscoderError(
                            f"Cannot {edit}: it has {len(added)} values for {len(positions)} positions of a prompt of "
                            f"{prompt_length} tokens; give one for each."
                        )
                singles += [(number, *entry) for entry in zip(positions, added, strict=True)]
            edit, position, added = zip(*singles, strict=True) if singles else ((), (), ())
            single = (_integers(edit), _integers(position), torch.tensor(added))
            placed = (single, _integers(ranges).view(-1, 4).T)
            self._placed = {prompt_length: placed}
        return placed

    def _within_padded(self, tokens, prompt_length, row, number):
        """As `_within`, for one row of a padded batch: positions count its tokens without padding."""
        real = tokens.real[row].cpu()
        start, length, prompt = (
            int(part.sum()) for part in (real[: tokens.start], real[tokens.start :], real[:prompt_length])
        )
        edit, position, added = self._within(start, length, prompt)
        own = self.list_numbers[edit] == number
        return edit[own], real.nonzero()[:, 0][position[own]], added[own]

    def _within(self, first, length, prompt_length):
        """Edit, position and added value of all edits that apply to the `length` tokens that start at `first`."""
        (edit, position, added), (range_edit, start, stop, step) = self.place(prompt_length)
        end = first + length
        inside = (position >= first) & (position < end)
        given = torch.arange(first, end)
        distance = given - start[:, None]
        hit = (distance >= 0) & (given < stop[:, None]) & (distance % step[:, None] == 0)
        number, column = hit.nonzero(as_tuple=True)
        found = range_edit[number]
        return (
            torch.cat([edit[inside], found]),
            torch.cat([position[inside], given[column]]),
            torch.cat([added[inside], self.added[found]]),
        )

    def _refuse_repeats(self, edit, row, position):
        end = int(position.max()) + 1 if len(position) else 1
        places = (row * end + position) * len(self.features) + self.columns[edit]
        order = places.sort(stable=True)
        repeated = (order.values.diff() == 0).nonzero()
        if len(repeated):
            first, second = (edit[order.indices[repeated[0, 0] + step]] for step in (0, 1))
            raise TranscoderError(
                f"Two edits change one activation ({self.edits[first]}; {self.edits[second]}): leave one of them out."
            )


def _bounds(position, prompt_length):
    """Start, stop and step of a slice, counted from the start of the prompt and not cut at its end."""
    position = slice(None) if position == "all" else position
    start, stop = (
        bound + prompt_length if bound is not None and bound < 0 else bound
        for bound in (position.start, position.stop)
    )
    return max(start or 0, 0), _NEVER if stop is None else max(stop, 0), position.step or 1


def _in_prompt(edit, prompt_length):
    """The positions of an edit that are in the prompt, in the order in which they were given."""
    if isinstance(edit.position, (slice, str)):
        start, stop, step = _bounds(edit.position, prompt_length)
        return list(range(start, min(stop, prompt_length), step))
    positions = [edit.position] if isinstance(edit.position, int) else list(edit.position)
    for position in positions:
        if not -prompt_length <= position < prompt_length:
            raise TranscoderError(
                f"Cannot {edit}: the prompt has the positions 0 to {prompt_length - 1}. For tokens that are generated "
                "after it, give a slice."
            )
    return [position % prompt_length for position in positions]


def _integers(numbers):
    return torch.tensor(numbers, dtype=torch.int64)
