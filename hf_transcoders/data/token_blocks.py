"""Token blocks for evaluations, and masks of the tokens that count."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..errors import TranscoderError
from ..lm.inputs import check_tokens
from .batches import TextBatch, read_text, text_batches
from .rows import token_rows


@dataclass(frozen=True)
class BlockBatch(TextBatch):
    """
    A batch of blocks for one forward pass.

    Args:
        mask (`torch.BoolTensor` of shape `(batch, longest)`): Tokens that count.
    """

    mask: torch.Tensor

    @property
    def predicting(self) -> torch.Tensor:
        """Mask `(batch, longest - 1)` of the tokens that count and have a next token in their block."""
        return self.mask[:, :-1] & self.real[:, 1:]

    @property
    def labels(self) -> torch.Tensor:
        """The next tokens `(tokens,)` of the predicting ones."""
        return self.input_ids[:, 1:][self.predicting]


class TokenBlocks:
    """The first blocks of a dataset in memory, without padding.

    Args:
        dataset (`Iterable[Mapping]`):
            Rows with `input_ids` and, if they are padded, `attention_mask`, as a map-style or iterable dataset or a list.
            It is read from its start as far as needed, see [`read_row`].
        max_tokens (`int`):
            Number of tokens that count; the last block may add a few more.
        skip_first (`int`):
            Number of tokens at the start of every block that do not count.
        special_token_ids (`Sequence[int]`, *optional*):
            Tokens that do not count.

    Attributes:
        texts (`Sequence[torch.LongTensor]`): Tokens `(tokens,)` of each block. Block i is row i of the dataset.
        masks (`Sequence[torch.BoolTensor]`): Masks of the tokens that count.
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
        self.skip_first, self.special_token_ids = skip_first, list(special_token_ids or [])
        self.texts = _read(dataset, max_tokens, skip_first)
        special = torch.tensor(self.special_token_ids, dtype=torch.long)
        self.masks = []
        for text in self.texts:
            mask = ~torch.isin(text, special) if len(special) else torch.ones(len(text), dtype=torch.bool)
            mask[:skip_first] = False
            self.masks.append(mask)
        if not any(mask.any() for mask in self.masks):
            raise TranscoderError("Every token of the dataset is a special token; give other `special_token_ids`.")

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return sum(int(mask.sum()) for mask in self.masks)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each block."""
        return [len(text) for text in self.texts]

    @cached_property
    def input_ids(self) -> torch.Tensor:
        """Token ids of all blocks `(blocks, longest)`, padded on the right with 0."""
        return pad_sequence(self.texts, batch_first=True)

    @cached_property
    def mask(self) -> torch.Tensor:
        """Mask `(blocks, longest)` of the tokens of `input_ids` that count."""
        return pad_sequence(self.masks, batch_first=True)

    def first(self, max_tokens: int) -> "TokenBlocks":
        """The first blocks with `max_tokens` tokens that count, or all blocks if there are fewer."""
        seen, predicts, blocks = 0, False, 0
        for mask in self.masks:
            if seen >= max_tokens and predicts:
                break
            # Nothing is predicted from a block of one token.
            seen, predicts, blocks = seen + int(mask.sum()), predicts or bool(mask[:-1].any()), blocks + 1
        return self._part(range(blocks))

    def split(self, parts: int) -> list["TokenBlocks"]:
        """Splits the blocks with tokens that count into `parts` consecutive groups, or fewer if there are fewer blocks."""
        counted = [number for number, mask in enumerate(self.masks) if mask.any()]
        parts = min(parts, len(counted))
        ends = [len(counted) * i // parts for i in range(parts + 1)]
        return [self._part(counted[start:end]) for start, end in itertools.pairwise(ends)]

    def _part(self, numbers: Iterable[int]) -> "TokenBlocks":
        part = copy.copy(self)
        # Derived from the texts and masks of all blocks.
        for name in ("input_ids", "mask"):
            part.__dict__.pop(name, None)
        part.texts, part.masks = zip(*((self.texts[number], self.masks[number]) for number in numbers), strict=True)
        return part

    def batches(
        self, model: PreTrainedModel, batch_size: int, numbers: Sequence[int] | None = None
    ) -> Iterator[BlockBatch]:
        """Batch blocks on the device of a model, see [`text_batches`].

        Args:
            model ([`~transformers.PreTrainedModel`]): Model that reads the blocks.
            batch_size (`int`): Largest number of blocks per batch.
            numbers (`Sequence[int]`, *optional*): Numbers of the blocks. All by default; empty blocks are left out.

        Raises:
            [`TranscoderError`]: the model cannot read a block.
        """
        numbers = range(len(self.texts)) if numbers is None else numbers
        texts = [self.texts[number] for number in numbers]
        check_tokens(model, texts, "Row", numbers)
        for batch in text_batches(model, texts, batch_size, numbers):
            mask = pad_sequence([self.masks[number] for number in batch.numbers], batch_first=True)
            yield BlockBatch(**vars(batch), mask=mask.to(batch.real.device))


def _read(dataset, max_tokens, skip_first):
    texts, wanted = [], max_tokens
    for number, row in enumerate(token_rows(dataset)):
        texts.append(read_text(row, f"Row {number} of the evaluation dataset"))
        wanted -= max(len(texts[-1]) - skip_first, 0)
        if wanted <= 0:
            break
    if not texts:
        raise TranscoderError("The evaluation dataset is empty; give rows with `input_ids`.")
    longest = max(map(len, texts))
    if longest < skip_first + 2:
        raise TranscoderError(
            f"The evaluation blocks have {longest} tokens: with the first {skip_first} left out, at least "
            f"{skip_first + 2} are needed, so pack longer blocks."
        )
    return texts
