"""Batch texts so that a language model computes the same for each as without batching."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..lm.devices import input_device
from ..lm.inputs import length_groups
from .rows import read_row


@dataclass(frozen=True)
class TextBatch:
    """
    A batch of texts for one forward pass.

    Padding is on the right, so that no token attends to it and positions count from the first token.

    Args:
        numbers (`list[int]`): Numbers of the texts.
        lengths (`list[int]`): Number of tokens of each text.
        input_ids (`torch.LongTensor` of shape `(batch, longest)`): Token ids, padded with 0.
        real (`torch.BoolTensor` of shape `(batch, longest)`): Tokens of the texts.
    """

    numbers: list[int]
    lengths: list[int]
    input_ids: torch.Tensor
    real: torch.Tensor

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Arguments of the model: `input_ids`, and `attention_mask` if there is padding."""
        if len(set(self.lengths)) == 1:
            return {"input_ids": self.input_ids}
        return {"input_ids": self.input_ids, "attention_mask": self.real.to(self.input_ids.dtype)}


def read_text(row: Mapping, what: str = "A row") -> torch.Tensor:
    """The tokens `(tokens,)` of a row without padding; arguments as in [`read_row`]."""
    return torch.tensor(read_row(row, what))


def text_batches(
    model: PreTrainedModel,
    texts: Sequence[torch.Tensor],
    batch_size: int | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[TextBatch]:
    """
    Batches texts of similar length, each with the positions that it has alone.

    Args:
        model ([`~transformers.PreTrainedModel`]): Model that reads the texts.
        texts (`Sequence[torch.LongTensor]`): Token ids `(tokens,)` of each text. Empty texts are left out.
        batch_size (`int`, *optional*): Largest number of texts per batch. By default as many as can share a forward pass.
        numbers (`Sequence[int]`, *optional*): Numbers of the texts in [`TextBatch`]. Defaults to 0, 1 and so on.

    Yields:
        [`TextBatch`]: batch on the model's device. Run it before the next one is requested.
    """
    numbers = range(len(texts)) if numbers is None else numbers
    lengths = [len(text) for text in texts]
    full = [place for place, length in enumerate(lengths) if length]
    for group in length_groups(model, [lengths[place] for place in full]):
        places = sorted((full[member] for member in group), key=lengths.__getitem__)
        size = batch_size or len(places)
        for start in range(0, len(places), size):
            chosen = places[start : start + size]
            yield pad_texts(
                [texts[place] for place in chosen], [numbers[place] for place in chosen], input_device(model)
            )


def pad_texts(texts: Sequence[torch.Tensor], numbers: Sequence[int], device: torch.device) -> TextBatch:
    """A [`TextBatch`] of texts, in their order."""
    lengths = [len(text) for text in texts]
    if len(set(lengths)) == 1:
        input_ids = torch.stack(list(texts))
        real = torch.ones_like(input_ids, dtype=torch.bool)
    else:
        input_ids = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
        real = torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]
    return TextBatch(list(numbers), lengths, input_ids.to(device), real.to(device))
