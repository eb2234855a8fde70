"""Measure the effects of features in the model: the change of its predictions when they are ablated."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batches import text_batches
from ..data.token_texts import token_texts
from ..lm.architectures import locate
from ..lm.devices import input_device
from ..lm.hooks import write_at
from ..lm.partial_forward import (
    block_of,
    final_hidden_states,
    logits_of,
    record_block_outputs,
    restart_at,
    vocabulary_size,
)
from ..lm.sites import output_sites
from ..models.linear_parts import decoder_rows
from ..models.modeling_transcoder import TranscoderModel


# Contexts in one forward pass.
_BATCH_SIZE = 16
# Elements of the largest tensors, sums for some features over the vocabulary.
_MAX_ELEMENTS = 2**24


@dataclass
class MeasuredChange:
    """The effect of a feature on the next-token predictions of the model, at contexts with its top activations.

    Args:
        contexts (`int`): Number of contexts.
        kl (`float`): Mean KL divergence, in nats, from the predictions with the feature to those with the feature ablated at
            this token.
        raised, lowered (`list[tuple[str, float]]`): Tokens with the largest changes, each with the change of its
            log-probability that is due to the feature. Tokens count by the probability that they have with or without the
            feature, so that the lists have none that the model would never predict there. Changes within the rounding of a
            model in half precision are left out.
    """

    contexts: int
    kl: float
    raised: list[tuple[str, float]]
    lowered: list[tuple[str, float]]


@torch.no_grad()
def measured_changes(
    base_model: PreTrainedModel,
    dictionary: TranscoderModel,
    contexts: Mapping[int, Sequence[tuple[torch.Tensor, float]]],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> dict[int, MeasuredChange]:
    """Ablate features at the last token of contexts, and measure the change of the next-token predictions there.

    Nothing is frozen. Blocks before the output site run once for both predictions.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): Causal language model, in evaluation mode.
        dictionary ([`TranscoderModel`]): The dictionary.
        contexts (`Mapping[int, Sequence[tuple[torch.LongTensor, float]]]`):
            Feature -> its contexts: the tokens up to the activation, included, and the activation.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer that decodes the tokens.
        count (`int`): Number of tokens for each feature, in each direction.

    Returns:
        `dict[int, MeasuredChange]`: of each feature with a context; empty for a model without a head.
    """
    found = {}
    if base_model.get_output_embeddings() is None:  # Without a head there are no predictions.
        return found
    features = [feature for feature, its in contexts.items() if its]
    # Sums over the vocabulary are kept for each feature until all its contexts were seen.
    some = max(1, _MAX_ELEMENTS // vocabulary_size(base_model))
    for first in range(0, len(features), some):
        part = features[first : first + some]
        listed = [(place, text, value) for place, feature in enumerate(part) for text, value in contexts[feature]]
        sums = _Sums(len(part), vocabulary_size(base_model), input_device(base_model))
        for numbers, plain, ablated in ablated_predictions(base_model, dictionary, part, listed):
            sums.add([listed[number][0] for number in numbers], plain, ablated)
        found |= {feature: sums.measured(place, tokenizer, count) for place, feature in enumerate(part)}
    return found


def ablated_predictions(
    base_model: PreTrainedModel,
    dictionary: TranscoderModel,
    features: Sequence[int],
    listed: Sequence[tuple[int, torch.Tensor, float]],
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Run contexts with and without what a feature writes at their last token; blocks before the output site run once.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): Causal language model, in evaluation mode.
        dictionary ([`TranscoderModel`]): The dictionary.
        features (`Sequence[int]`): Numbers of the features.
        listed (`Sequence[tuple[int, torch.LongTensor, float]]`):
            Contexts: the place of a feature in `features`, the tokens up to its activation, included, and the activation to
            take away.

    Yields:
        `tuple`: numbers of some contexts in `listed`, and their logits `(contexts, vocabulary)` with and without the feature.
    """
    sites = output_sites(dictionary)
    device = dictionary.device
    numbers = torch.tensor([features[place] for place, _, _ in listed], device=device)
    values = torch.tensor([value for _, _, value in listed], device=device)[:, None]
    start = min(block_of(base_model, site) for site in sites)
    for batch in text_batches(base_model, [text for _, text, _ in listed], _BATCH_SIZE):
        own = torch.tensor(batch.numbers, device=device)
        last = (torch.arange(len(own)), torch.tensor(batch.lengths) - 1)
        with record_block_outputs(base_model, {start - 1} if start else set()) as below:
            plain = logits_of(base_model, final_hidden_states(base_model, **batch.inputs)[last])
        with ExitStack() as stack:
            if start:
                stack.enter_context(restart_at(base_model, start, below[start - 1]))
            for site in sites:
                written = decoder_rows(dictionary, numbers[own], site) * values[own]
                write_at(stack, locate(base_model, site), _without(written, last))
            ablated = logits_of(base_model, final_hidden_states(base_model, **batch.inputs)[last])
        yield batch.numbers, plain, ablated


def _without(written, last):
    """A function that subtracts the writes of features at some tokens."""

    def subtract(value):
        change = written.to(value.device, value.dtype)
        return value.index_put(tuple(index.to(value.device) for index in last), -change, accumulate=True)

    return subtract


class _Sums:
    """Sums over the contexts of each of some features."""

    def __init__(self, features: int, vocabulary: int, device: torch.device):
        self.contexts = torch.zeros(features, device=device)
        self.kl = torch.zeros(features, device=device)
        # Probabilities, with or without the feature, and the changes of log-probabilities weighted by them.
        self.weights = torch.zeros(features, vocabulary, device=device)
        self.changes = torch.zeros(features, vocabulary, device=device)
        # Changes of a logit up to this size can be rounding.
        self.rounding = 0.0

    def add(self, places, plain, ablated):
        """Add the logits of contexts `(contexts, vocabulary)` with and without the feature that each belongs to."""
        if plain.dtype in (torch.bfloat16, torch.float16):
            self.rounding = max(self.rounding, torch.finfo(plain.dtype).eps * plain.abs().max().item())
        plain, ablated = (logits.float().log_softmax(-1) for logits in (plain, ablated))
        change, weight = plain - ablated, torch.maximum(plain, ablated).exp()
        places = torch.tensor(places, device=plain.device)
        self.contexts.index_add_(0, places, torch.ones_like(places, dtype=torch.float32))
        self.kl.index_add_(0, places, (plain.exp() * change).sum(-1))
        self.weights.index_add_(0, places, weight)
        self.changes.index_add_(0, places, weight * change)

    def measured(self, place: int, tokenizer, count: int) -> MeasuredChange:
        """The change by one of the features."""
        changes, contexts = self.changes[place], int(self.contexts[place])
        mean = changes / self.weights[place].clamp(min=1e-30)
        listed = []
        for sign in (1, -1):
            best = (sign * changes).topk(min(count, len(changes))).indices
            best = best[sign * mean[best] > self.rounding]
            listed.append(list(zip(token_texts(tokenizer, best.tolist()), mean[best].tolist(), strict=True)))
        return MeasuredChange(contexts, self.kl[place].item() / contexts, *listed)
