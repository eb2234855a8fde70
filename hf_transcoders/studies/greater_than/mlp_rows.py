"""Many versions of one layer's MLP in one forward, from that layer on."""

from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from ...errors import TranscoderError
from ...lm.architectures import locate
from ...lm.devices import input_device
from ...lm.hooks import Location, read_at, write_at
from ...lm.inputs import forget_lengths_
from ...lm.linear_maps import linear_modules, map_size
from ...lm.partial_forward import final_hidden_states, logits_of, record_block_outputs, restart_at
from ...lm.sites import Site


# Tokens of one forward; more of them no longer make it faster per token.
_TOKENS = 4096


def neurons_location(model: PreTrainedModel, layer: int) -> Location:
    """Where the neurons of an MLP are: what its down projection reads.

    Raises:
        [`TranscoderError`]: the MLP does not end in one linear map to the residual stream.
    """
    mlp = locate(model, Site("mlp.out", layer))
    linear = list(linear_modules(mlp.module))
    down = linear[-1] if linear else None
    if down is None or map_size(down)[0] != model.config.get_text_config().hidden_size:
        raise TranscoderError(
            f"The MLP of layer {layer} does not end in one linear map, so it has no neurons to compare with: choose a "
            "layer with a plain MLP."
        )
    return Location(down, "in", mlp.block)


class MlpRows:
    """
    One batch of prompts, whose forwards begin at the MLP of a layer as often as one likes.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        input_ids (`torch.LongTensor` of shape `(prompts, seq)`): Prompts of one length.
        layer (`int`): The layer.
        skip_first (`int`): Positions at the start of each prompt that are never changed.
    """

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor, layer: int, skip_first: int):
        if not 0 <= skip_first < input_ids.shape[1]:
            raise TranscoderError(
                f"The first {skip_first} positions stay unchanged, but the prompts have {input_ids.shape[1]}: skip fewer."
            )
        self.model = model
        self.input_ids = input_ids.to(input_device(model))
        self.layer = layer
        self.skip_first = skip_first
        self._below = None

    @torch.no_grad()
    def record(self, locations: dict[str, Location]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Runs the unchanged model once, and keeps the residual stream that enters the layer.

        Args:
            locations (`dict[str, Location]`): What to read, by a name.

        Returns:
            `tuple`: logits of the last position `(prompts, vocab)`, and what was read, `(prompts, seq, width)` by name.
        """
        values = {}
        with ExitStack() as stack:
            for name, location in locations.items():
                read_at(stack, location, lambda value, name=name: values.__setitem__(name, value))
            below = stack.enter_context(record_block_outputs(self.model, {self.layer - 1} if self.layer else set()))
            forget_lengths_(self.model)
            last = final_hidden_states(self.model, self.input_ids)[:, -1]
        self._below = below.get(self.layer - 1)
        return logits_of(self.model, last), values

    def per_forward(self) -> int:
        """How many versions one forward takes."""
        return max(1, _TOKENS // self.input_ids.numel())

    @torch.no_grad()
    def logits(self, location: Location, values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """
        Logits at the last position, with other values at a place of the layer, from one forward.

        Args:
            location ([`Location`]): The place.
            values (`torch.Tensor` of shape `(versions, prompts, seq, width)`): What to write, in several versions.
            tokens (`torch.LongTensor` of shape `(tokens,)`): The tokens whose logits are wanted.

        Returns:
            `torch.Tensor` of shape `(versions, prompts, tokens)` in fp32.
        """
        count = len(values)
        rows = values.flatten(0, 1)

        def write(true):
            new = rows.to(true.device, true.dtype)
            return torch.cat([true[:, : self.skip_first], new[:, self.skip_first :]], dim=1)

        ids = self.input_ids.repeat(count, 1)
        with ExitStack() as stack:
            if self.layer:
                below = self._below
                if isinstance(below, tuple):
                    below = (below[0].repeat(count, 1, 1), *below[1:])
                else:
                    below = below.repeat(count, 1, 1)
                stack.enter_context(restart_at(self.model, self.layer, below))
            write_at(stack, location, write)
            last = final_hidden_states(self.model, ids)[:, -1]
        logits = logits_of(self.model, last)[:, tokens.to(last.device)].float()
        return logits.unflatten(0, (count, len(self.input_ids)))
