"""The output tokens that features promote and suppress on their direct path to the logits."""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.token_texts import token_texts
from ..errors import TranscoderError
from ..lm.architectures import architecture_of
from ..lm.devices import input_device
from ..lm.linear_maps import map_size
from ..lm.sites import output_sites
from ..lm.stream import direct_logits, writes_to_stream, written_directions
from ..models.linear_parts import decoder_rows
from ..models.modeling_transcoder import TranscoderModel
from ..text import logging


logger = logging.get_logger(__name__)

TokenScores = list[tuple[str, float]]

# Elements of the largest temporary, the weights of some rows for all tokens.
_MAX_ELEMENTS = 2**25


def promoted_tokens(
    base_model: PreTrainedModel,
    dictionary: TranscoderModel,
    features: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> tuple[list[TokenScores], list[TokenScores]]:
    """Find the tokens that features promote and suppress most on their direct path, compared with the other features.

    The direct path of a feature is its decoder row through the final norm's gain and the unembedding, without the norm's
    scale and without what later layers make of it. Tokens are ranked by the z-score over features: the weight of a token
    less its mean over all features of the dictionary, divided by its deviation over them. Ranked by the weights alone, the
    lists of most features share the rare tokens whose unembeddings are long (measured in benchmarks/direct_path.py).

    Args:
        base_model ([`~transformers.PreTrainedModel`]): Causal language model.
        dictionary ([`TranscoderModel`]): The dictionary.
        features (`Sequence[int]`): Numbers of the features.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer that decodes the tokens.
        count (`int`): Number of tokens for each feature, in each direction.

    Returns:
        `tuple[list[list[tuple[str, float]]], list[list[tuple[str, float]]]]`: promoted and suppressed tokens of each
        feature, with their z-scores. They are empty, and a warning says why, where the dictionary does not write to
        the residual stream or the model's family is not known.
    """
    for site in output_sites(dictionary):
        if why_not := why_no_logits(base_model, dictionary, site):
            logger.warning_once(f"The direct path of features to the logits is left out: {why_not}.")
            return [[] for _ in features], [[] for _ in features]
    promoted, suppressed = [], []
    for z in direct_path_scores(base_model, dictionary, features):
        most = min(count, z.shape[-1])
        for found, best in ((promoted, z.topk(most)), (suppressed, z.topk(most, largest=False))):
            found += [
                list(zip(token_texts(tokenizer, ids), values, strict=True))
                for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
    return promoted, suppressed


@torch.no_grad()
def direct_path_scores(
    base_model: PreTrainedModel, dictionary: TranscoderModel, features: Sequence[int]
) -> Iterator[torch.Tensor]:
    """Z-scores over features of the direct path from features to all tokens, a few features at a time.

    Features times vocabulary is never held in memory. A token's weights are linear in the decoder rows, so that their mean
    over features is the weight of the mean row, and their variance a sum of squares of weights of at most as many rows as
    the stream is wide: those of the triangular factor of all centered rows.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): Causal language model.
        dictionary ([`TranscoderModel`]): A dictionary that writes to the residual stream.
        features (`Sequence[int]`): Numbers of the features.

    Yields:
        `torch.Tensor` of shape `(some features, vocabulary)`: z-scores, of the features in their order. A token that all
        features weigh alike has the z-score 0.
    """
    rows = stream_rows(base_model, dictionary, torch.arange(dictionary.config.num_features, device=dictionary.device))
    mean_row = rows.mean(0, keepdim=True)
    mean = direct_logits(base_model, mean_row)[0]
    some = max(1, _MAX_ELEMENTS // len(mean))
    factor = torch.linalg.qr(rows - mean_row, mode="r").R
    variance = torch.zeros_like(mean)
    for part in factor.split(some):
        variance += direct_logits(base_model, part).square().sum(0)
    deviation = (variance / len(rows)).sqrt()
    alike = deviation <= 1e-6 * deviation.max()
    for part in torch.tensor(list(features), dtype=torch.long, device=rows.device).split(some):
        z = (direct_logits(base_model, rows[part]) - mean) / deviation
        yield z.masked_fill_(alike, 0.0)


def stream_rows(base_model, dictionary, features):
    """The writes of features to the residual stream per unit of activation, `(features, hidden)` in fp32."""
    written = []
    # What is written at several sites adds up in the stream.
    for site in output_sites(dictionary):
        rows = decoder_rows(dictionary, features, site, up_to_scale=True).to(input_device(base_model))
        written.append(written_directions(base_model, site, rows) if site.module is None else rows)
    return torch.stack(written).sum(0)


def why_no_logits(base_model, dictionary, site) -> str | None:
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
