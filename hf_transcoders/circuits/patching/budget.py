"""Estimate how many patched runs fit into one batch."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...errors import TranscoderError
from ...lm.architectures import num_layers
from ...lm.attention import num_heads
from ...lm.devices import input_device


_ON_CPU = 1 << 30
# Larger batches of rows leave the processor's caches; with 1 GiB, rows of all positions take twice as long.
_ROWS_ON_CPU = 64 << 20


@dataclass(frozen=True)
class Budget:
    """The size of a batch, which is either given or follows from the memory.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        seq (`int`): Number of tokens of the longest prompt.
        batch_size (`int`, *optional*): Number of rows times prompts of a batch.
        max_memory (`int`, *optional*): Number of bytes that a batch may take.

    Raises:
        [`TranscoderError`]: `batch_size` is below 1, or both limits are given.
    """

    model: PreTrainedModel
    seq: int
    batch_size: int | None = None
    max_memory: int | None = None

    def __post_init__(self):
        if self.batch_size is not None and self.batch_size < 1:
            raise TranscoderError(f"batch_size is {self.batch_size}, but a batch has at least one row.")
        if self.batch_size is not None and self.max_memory is not None:
            raise TranscoderError("batch_size and max_memory both limit the batch: give one of them.")

    def rows(self, prompts: int, window: int) -> int:
        """Number of rows of `prompts` prompts and `window` tokens that fit into a batch."""
        if self.batch_size is not None:
            return max(1, self.batch_size // prompts)
        memory = self._memory()
        if input_device(self.model).type == "cpu":
            memory = min(memory, _ROWS_ON_CPU)
        return max(1, int(memory / (prompts * window * self._bytes_per_token())))

    def prompts(self, window: int, parts: int, rows: int) -> int:
        """Number of prompts that fit into a batch with `parts` recorded activations of `window` tokens each."""
        if self.batch_size is not None:
            return self.batch_size
        recorded = num_layers(self.model) * self._item() * self.model.config.get_text_config().hidden_size
        each = recorded * (2 * self.seq + parts * window)
        few = min(rows, 8)
        memory = self._memory()
        return max(1, int(min(memory / each, memory / (few * window * self._bytes_per_token()))))

    def _bytes_per_token(self):
        """Approximate size of one token of one row in the widest part of a block, including its residual stream."""
        config = self.model.config.get_text_config()
        inner = (
            getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
        )
        return self._item() * (8 * config.hidden_size + 4 * inner) + 12 * num_heads(self.model)[0] * self.seq

    def _memory(self):
        if self.max_memory is not None:
            return self.max_memory
        device = input_device(self.model)
        return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _ON_CPU

    def _item(self):
        return torch.finfo(self.model.dtype).bits // 8
