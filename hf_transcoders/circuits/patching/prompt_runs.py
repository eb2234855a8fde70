"""Run the prompts of one side of a task in batches, and record their activations."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...lm.devices import input_device
from ...lm.inputs import check_tokens, length_groups
from ...tasks.task import TokenBatch
from .run_recording import Recording, Window, record


@dataclass(frozen=True)
class PromptRuns:
    """The clean or the corrupted prompts of a task, and the model that runs them.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        tokens ([`TokenBatch`]): The prompts, on the CPU.

    Raises:
        [`TranscoderError`]: the model cannot read a prompt.
    """

    model: PreTrainedModel
    tokens: TokenBatch

    def __post_init__(self):
        lengths = self.tokens.lengths.tolist()
        prompts = [row[:length] for row, length in zip(self.tokens.input_ids, lengths, strict=True)]
        check_tokens(self.model, prompts, "Prompt", range(len(prompts)))

    @property
    def last(self) -> torch.Tensor:
        """Index of the last token of each prompt, `(prompts,)`."""
        return self.tokens.positions["END"]

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """Prompts of similar length in batches of at most `size` that can share a forward pass, as indices."""
        lengths = self.tokens.lengths
        for group in length_groups(self.model, lengths.tolist()):
            group = torch.tensor(group)
            yield from group[lengths[group].argsort(stable=True)].split(size)

    def record(self, prompts: torch.Tensor, window: Window, parts: set[str]) -> Recording:
        """Run some prompts.

        Args:
            prompts (`torch.LongTensor` of shape `(prompts,)`): Indices of the prompts.
            window ([`Window`]): The tokens whose activations are recorded.
            parts (`set[str]`): Names of the activations to record.

        Returns:
            [`Recording`]
        """
        device = input_device(self.model)
        longest = int(self.tokens.lengths[prompts].max())
        ids = self.tokens.input_ids[prompts, :longest].to(device)
        return record(self.model, ids, self.last[prompts].to(device), window, parts)
