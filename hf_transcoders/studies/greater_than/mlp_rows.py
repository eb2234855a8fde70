"""Run many changes of one MLP in one forward pass, from its layer on."""

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


# Tokens per forward pass; more of them are not faster per token.
_TOKENS = 4096


def neurons_location(model: PreTrainedModel, layer: int) -> Location:
    """Return the location of the neurons of an MLP, the input of its down projection.

    Raises:
        [`TranscoderError`]: The MLP does not end in one linear map to the residual stream.
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
    A batch of prompts whose forward pass can be restarted at the MLP of a layer.

    Args:
        model ([`~transformers.PreTrainedModel`]): Causal language model in evaluation mode.
        input_ids (`torch.LongTensor` of shape `(prompts, seq)`): Prompts of equal length.
        layer (`int`): Layer of the MLP.
        skip_first (`int`): Number of positions at the start of each prompt to leave unchanged.
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
        Run the unchanged model once, and keep the residual stream before the layer.

        Args:
            locations (`dict[str, Location]`): Name -> location to read.

        Returns:
            `tuple`: Logits of the last position `(prompts, vocab)`, and name -> activations `(prompts, seq, width)`.
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
        """Number of versions per forward pass."""
        return max(1, _TOKENS // self.input_ids.numel())

    @torch.no_grad()
    def logits(self, location: Location, values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """
        Compute logits at the last position with changed activations in the layer, in one forward pass.

        Args:
            location ([`Location`]): Location to change.
            values (`torch.Tensor` of shape `(versions, prompts, seq, width)`): New activations, in several versions.
            tokens (`torch.LongTensor` of shape `(tokens,)`): Tokens whose logits to return.

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
