"""Draw text for the contexts of features from all of a dataset, and tell contexts and documents apart."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from ..data.batches import read_text
from ..data.rows import token_rows
from ..data.token_blocks import TokenBlocks


# Tokens on each side of an activation in which two contexts must differ.
_SIDE = 5
# Rows before a drawn one that are read to find where its first document begins; a longer document counts as several.
_LOOK_BACK = 64
# A place in a dataset is a row times this, and the position in the row.
_ROW = 2**32


@dataclass(frozen=True)
class TextSample:
    """Blocks from all of a dataset, and the data that distinguishes their contexts.

    Args:
        blocks ([`TokenBlocks`]): The blocks.
        rows (`Sequence[int]`): Row of the dataset that each block is.
        contexts (`torch.LongTensor` of shape `(blocks, longest)`): A number for each token that is equal where the token and
            its neighbors are. `None` if contexts and documents need not differ.
        documents (`torch.LongTensor` of shape `(blocks, longest)`): Number of the document of each token.
        priorities (`torch.Tensor` of shape `(blocks, longest)`): Random numbers above 0 by which tokens are drawn.
        row_priorities (`torch.Tensor` of shape `(blocks,)`): Random numbers above 0 by which rows are drawn.
    """

    blocks: TokenBlocks
    rows: Sequence[int]
    contexts: torch.Tensor | None
    documents: torch.Tensor | None
    priorities: torch.Tensor
    row_priorities: torch.Tensor


def whole_text(blocks: TokenBlocks) -> TextSample:
    """Blocks that are read as they are: with examples of equal contexts, several from a document, and none at random."""
    nothing = torch.zeros(len(blocks.texts), max(blocks.lengths))
    return TextSample(blocks, range(len(blocks.texts)), None, None, nothing, nothing[:, 0])


def sample_text(
    dataset: Iterable[Mapping],
    *,
    max_tokens: int,
    skip_first: int = 0,
    special_token_ids: Sequence[int] | None = None,
    separator: int | None = None,
    seed: int = 0,
) -> TextSample:
    """Draw blocks from all of a dataset at random.

    Args:
        dataset (`Iterable[Mapping]`):
            Rows with `input_ids` and, if they are padded, `attention_mask`. Only rows with numbers can be drawn: a dataset
            that can only be read in order is read from its start.
        max_tokens, skip_first, special_token_ids: As for [`TokenBlocks`].
        separator (`int`, *optional*):
            Token that ends documents. If no block has it, each row is a document.
        seed (`int`, *optional*, defaults to 0): Seed of the draw.

    Returns:
        [`TextSample`]: the blocks in the order of the dataset.

    Raises:
        [`TranscoderError`]: as for [`TokenBlocks`].
    """
    generator = torch.Generator().manual_seed(seed)
    source, chosen = token_rows(dataset), None
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        chosen = _draw(source, max_tokens, skip_first, generator)
        dataset = [{"input_ids": text} for _, text in chosen]
    blocks = TokenBlocks(dataset, max_tokens=max_tokens, skip_first=skip_first, special_token_ids=special_token_ids)
    rows = range(len(blocks.texts)) if chosen is None else [row for row, _ in chosen[: len(blocks.texts)]]
    documents = _documents(None if chosen is None else source, rows, blocks.texts, separator)
    longest = max(map(len, blocks.texts))
    return TextSample(
        blocks=blocks,
        rows=rows,
        contexts=pad_sequence([_context_numbers(text) for text in blocks.texts], batch_first=True),
        documents=pad_sequence(documents, batch_first=True),
        priorities=torch.rand(len(blocks.texts), longest, generator=generator).clamp(min=1e-9),
        row_priorities=torch.rand(len(blocks.texts), generator=generator).clamp(min=1e-9),
    )


def _draw(source, max_tokens, skip_first, generator):
    """Rows drawn without replacement, with their tokens, in the order of the dataset: all of them if there are few."""
    drawn, wanted = [], max_tokens
    for row in torch.randperm(len(source), generator=generator).tolist():
        text = read_text(source[row], f"Row {row} of the evaluation dataset")
        drawn.append((row, text))
        wanted -= max(len(text) - skip_first, 0)
        if wanted <= 0:
            break
    return sorted(drawn, key=lambda pair: pair[0])


def _context_numbers(text):
    """A number for each token that is equal, but for chance, where the token and its neighbors are."""
    padded = torch.nn.functional.pad(text, (_SIDE, _SIDE), value=-1)
    windows = padded.unfold(0, 2 * _SIDE + 1, 1)
    # A polynomial hash; products wrap around.
    factors = torch.tensor([pow(6364136223846793005, power, 2**63) for power in range(1, 2 * _SIDE + 2)])
    numbers = (windows * factors).sum(-1)
    return numbers ^ (numbers >> 31)


def _documents(source, rows, texts, separator):
    """The place at which the document of each token begins, for each block `(tokens,)`."""
    packed = separator is not None and any((text == separator).any() for text in texts)
    documents, last_row, last = [], -1, 0
    for row, text in zip(rows, texts, strict=True):
        if not len(text):
            documents.append(text)
            continue
        begin = row * _ROW
        if packed:
            begin = _begin(source, row, separator, last_row, last)
        starts = torch.zeros_like(text)
        starts[0] = begin
        if packed:
            after = (text[:-1] == separator).nonzero()[:, 0] + 1
            starts[after] = row * _ROW + after
        documents.append(starts.cummax(0).values)
        ended = packed and text[-1] == separator
        last_row, last = row, row * _ROW + len(text) if ended else int(documents[-1][-1])
    return documents


def _begin(source, row, separator, last_row, last):
    """The place at which the first document of a row begins; `last` is that of the last document of `last_row`."""
    first = max(0, row - _LOOK_BACK)
    for before in range(row - 1, first - 1, -1):
        if before == last_row:
            return last
        text = read_text(source[before], f"Row {before} of the evaluation dataset")
        ends = (text == separator).nonzero()[:, 0]
        if len(ends):
            return before * _ROW + int(ends[-1]) + 1
    return first * _ROW
