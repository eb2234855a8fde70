"""The output tokens that features promote and suppress."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.token_texts import token_texts
from ..errors import TranscoderError
from ..lm.architectures import architecture_of
from ..lm.devices import input_device
from ..lm.linear_maps import map_size
from ..lm.sites import Site
from ..lm.stream import direct_logits, writes_to_stream, written_directions
from ..models.linear_parts import decoder_rows
from ..models.modeling_transcoder import TranscoderModel
from ..text import logging


logger = logging.get_logger(__name__)

TokenLogits = list[tuple[str, float]]


def promoted_tokens(
    base_model: PreTrainedModel,
    dictionary: TranscoderModel,
    features: list[int],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> tuple[list[TokenLogits], list[TokenLogits]]:
    """Find the tokens whose logits features raise and lower most, per unit of activation.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): Causal language model.
        dictionary ([`TranscoderModel`]): The dictionary.
        features (`list[int]`): Numbers of the features.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer that decodes the tokens.
        count (`int`): Number of tokens for each feature, in each direction.

    Returns:
        `tuple[list[list[tuple[str, float]]], list[list[tuple[str, float]]]]`: promoted and suppressed tokens of each
        feature, with their change in logit. They are empty, and a warning says why, where the dictionary does not write to
        the residual stream or the model's family is not known.
    """
    # What is written at several sites adds up in the stream.
    numbers, written = torch.tensor(features, device=dictionary.device), []
    for site in map(Site.parse, dictionary.config.output_sites):
        if why_not := _why_no_logits(base_model, dictionary, site):
            logger.warning_once(f"The promoted tokens of features are left out: {why_not}.")
            return [[] for _ in features], [[] for _ in features]
        rows = decoder_rows(dictionary, numbers, site).to(input_device(base_model))
        written.append(rows if site.module is not None else written_directions(base_model, site, rows))
    logits = direct_logits(base_model, torch.stack(written).sum(0))
    count = min(count, logits.shape[-1])
    return tuple(
        [
            list(zip(token_texts(tokenizer, ids), values, strict=True))
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        for best in (logits.topk(count), logits.topk(count, largest=False))
    )


def _why_no_logits(base_model, dictionary, site) -> str | None:
    """Why decoder rows have no direct effect on logits, or `None` if they have."""
    head, width = base_model.get_output_embeddings(), dictionary.config.d_out
    if head is None:
        return f"{type(base_model).__name__} has no language-model head"
    try:
        architecture_of(base_model)
    except TranscoderError:
        return f"the residual stream of model type '{base_model.config.model_type}' is not known to this library"
    if not (site.module or writes_to_stream(site)):
        return f"'{site}' is not added to the residual stream"
    if not width == base_model.config.get_text_config().hidden_size == map_size(head)[1]:
        return f"'{site}' is {width} wide, and the input of the unembedding {map_size(head)[1]}"
    return None
