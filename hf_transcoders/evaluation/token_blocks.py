"""Token blocks to measure on, and which of their positions count."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from ..errors import TranscoderError


class TokenBlocks:
    """The first blocks of a dataset, in memory.

    Args:
        dataset (`Iterable[Mapping]`):
            Rows with `input_ids`, all of one length; a map-style or iterable dataset, or a list. It is read from its
            start, and no further than needed.
        max_tokens (`int`):
            How many counted tokens are wanted; the last block may bring a few more.
        skip_first (`int`):
            Positions at the start of every block that do not count.
        special_token_ids (`Sequence[int]`, *optional*):
            Tokens that do not count.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(blocks, seq)`)
        mask (`torch.BoolTensor` of shape `(blocks, seq)`): the positions that count.
    """

    def __init__(
        self,
        dataset: Iterable[Mapping],
        *,
        max_tokens: int,
        skip_first: int = 0,
        special_token_ids: Sequence[int] | None = None,
    ):
        if max_tokens < 1:
            raise TranscoderError(f"max_tokens is {max_tokens}; give a number of at least 1.")
        if skip_first < 0:
            raise TranscoderError(f"skip_first is {skip_first}; give the number of positions to leave out, 0 or more.")
        self.input_ids = _read(dataset, max_tokens, skip_first)
        self.mask = torch.ones_like(self.input_ids, dtype=torch.bool)
        self.mask[:, :skip_first] = False
        if special_token_ids:
            self.mask &= ~torch.isin(self.input_ids, torch.tensor(list(special_token_ids)))
        if not self.mask.any():
            raise TranscoderError("Every token of the dataset is a special token; give other `special_token_ids`.")

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return int(self.mask.sum())

    def first(self, max_tokens: int) -> "TokenBlocks":
        """The leading blocks that hold `max_tokens` counted tokens, or all of them where there are fewer."""
        seen = self.mask.sum(-1).cumsum(0)
        blocks = int((seen < max_tokens).sum()) + 1
        return self._part(slice(blocks))

    def split(self, parts: int) -> list["TokenBlocks"]:
        """The blocks in `parts` runs of nearly equal length, fewer where there are fewer blocks."""
        parts = min(parts, len(self.input_ids))
        ends = [len(self.input_ids) * i // parts for i in range(parts + 1)]
        return [self._part(slice(start, end)) for start, end in itertools.pairwise(ends)]

    def _part(self, rows: slice) -> "TokenBlocks":
        part = object.__new__(TokenBlocks)
        part.input_ids, part.mask = self.input_ids[rows], self.mask[rows]
        return part

    def batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of `input_ids` and `mask`, each `(batch, seq)`, on a device."""
        for ids, mask in zip(self.input_ids.split(batch_size), self.mask.split(batch_size), strict=True):
            yield ids.to(device), mask.to(device)


def _read(dataset, max_tokens, skip_first):
    rows = iter(dataset)
    first = next(rows, None)
    if first is None:
        raise TranscoderError("The evaluation dataset is empty; give rows with `input_ids`.")
    if "input_ids" not in first:
        raise TranscoderError(
            f"The evaluation dataset has no column `input_ids` (it has {', '.join(first)}); tokenize and pack it first."
        )
    length = len(first["input_ids"])
    if length < skip_first + 2:
        raise TranscoderError(
            f"The evaluation blocks have {length} tokens: with the first {skip_first} left out, at least "
            f"{skip_first + 2} are needed, so pack longer blocks."
        )
    blocks = []
    for row in itertools.chain([first], itertools.islice(rows, math.ceil(max_tokens / (length - skip_first)) - 1)):
        block = torch.as_tensor(row["input_ids"])
        if len(block) != length:
            raise TranscoderError(
                f"The evaluation blocks have {length} and {len(block)} tokens; pack the dataset into blocks of one length."
            )
        blocks.append(block)
    return torch.stack(blocks).long()
