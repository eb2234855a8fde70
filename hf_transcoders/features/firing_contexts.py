"""Contexts in which given features are strongly active, drawn at random."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.token_blocks import TokenBlocks
from ..data.token_texts import token_texts
from ..lm.capture import capture
from ..lm.modes import in_eval_mode
from ..models.modeling_transcoder import TranscoderModel


# Elements of the largest temporary, the features of some tokens.
_MAX_ELEMENTS = 2**23


@dataclass(frozen=True)
class FiringContext:
    """
    A context of a feature.

    Args:
        tokens (`torch.LongTensor` of shape `(tokens,)`): The tokens of a block up to the activation, included.
        activation (`float`): Activation at the last of them.
    """

    tokens: torch.Tensor
    activation: float

    def to_text(self, tokenizer: PreTrainedTokenizerBase, window: int = 12) -> str:
        """The last tokens as text, with the last of them in `[[ ]]`."""
        texts = token_texts(tokenizer, self.tokens[-window:].tolist())
        return "".join([*texts[:-1], f"[[{texts[-1]}]]"])


@torch.no_grad()
def firing_contexts(
    base_model: PreTrainedModel,
    dictionary: TranscoderModel,
    features: Sequence[int],
    blocks: TokenBlocks,
    count: int,
    *,
    lowest_share: float = 0.5,
    outlier_factor: float | None = 10.0,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[int, list[FiringContext]]:
    """
    Draws contexts in which features have at least a share of their largest activation, one from a block at most.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): Language model, which runs in evaluation mode.
        dictionary ([`TranscoderModel`]): The dictionary.
        features (`Sequence[int]`): Numbers of the features.
        blocks ([`TokenBlocks`]): Blocks to search; tokens that do not count there are not searched.
        count (`int`): Largest number of contexts of each feature.
        lowest_share (`float`, *optional*, defaults to 0.5):
            Smallest activation, as a share of the largest in the text. Cunningham et al. (2023) draw from [M / 2, M].
        outlier_factor (`float`, *optional*, defaults to 10.0):
            Factor of a batch's median norm above which tokens are not searched, as [`ActivationHarvester`] leaves them out of
            training: on the few tokens that models use as attention sinks, nearly every feature has its largest activation.
            `None` searches all.
        batch_size (`int`, *optional*, defaults to 8): Blocks per forward pass.
        seed (`int`, *optional*, defaults to 0): Seed of the draw.

    Returns:
        `dict[int, list[FiringContext]]`: feature -> its contexts, strongest first; none for a feature that never fires.
    """
    wanted = torch.tensor(list(features), dtype=torch.long, device=dictionary.device)
    site = dictionary.config.input_site
    # The strongest activation of each block and its position, `(blocks, features)`.
    strongest = torch.zeros(len(blocks.texts), len(wanted))
    positions = torch.zeros(len(blocks.texts), len(wanted), dtype=torch.long)
    with in_eval_mode(base_model, dictionary), capture(base_model, [site]) as activations:
        for batch in blocks.batches(base_model, batch_size):
            base_model(**batch.inputs)
            inputs = activations.of_tokens(site, batch.input_ids.shape)
            mask = batch.mask.to(inputs.device)
            if outlier_factor is not None and mask.any():
                norms = inputs.float().norm(dim=-1)
                mask = mask & (norms <= outlier_factor * norms[mask].median())
            found = some_features(dictionary, inputs, wanted).where(mask[..., None].to(dictionary.device), 0)
            values, places = found.max(1)
            strongest[batch.numbers], positions[batch.numbers] = values.cpu(), places.cpu()
    generator = torch.Generator().manual_seed(seed)
    contexts = {}
    for column, feature in enumerate(features):
        values = strongest[:, column]
        among = ((values > 0) & (values >= lowest_share * values.max())).nonzero()[:, 0]
        drawn = among[torch.randperm(len(among), generator=generator)[:count]]
        drawn = drawn[values[drawn].argsort(descending=True, stable=True)]
        contexts[feature] = [
            FiringContext(blocks.texts[row][: int(positions[row, column]) + 1], values[row].item())
            for row in drawn.tolist()
        ]
    return contexts


def some_features(dictionary: TranscoderModel, inputs: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Activations of some features, `(..., k)` in fp32, for inputs `(..., d_in)`, with few tokens' features in memory at once."""
    rows = inputs.reshape(-1, inputs.shape[-1]).to(dictionary.device, dictionary.W_enc.dtype)
    size = max(1, _MAX_ELEMENTS // dictionary.config.num_features)
    parts = [dictionary.encode(part)[:, features].float() for part in rows.split(size)]
    return torch.cat(parts).view(*inputs.shape[:-1], len(features))
