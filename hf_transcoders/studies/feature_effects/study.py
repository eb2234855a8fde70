"""What single features do to the next-token logits: taken away until they are off, beside their direct path."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.batches import text_batches
from ...data.token_blocks import TokenBlocks
from ...data.token_texts import token_texts
from ...dictionaries import check_features, fitting_dictionaries
from ...errors import TranscoderError
from ...evaluation.rank_correlation import spearman_correlation
from ...features.firing_contexts import firing_contexts
from ...features.measured_change import ablated_predictions
from ...features.promoted_tokens import stream_rows, why_no_logits
from ...lm.capture import capture
from ...lm.forwards import check_head
from ...lm.modes import in_eval_mode
from ...lm.partial_forward import vocabulary_size
from ...lm.sites import output_site
from ...lm.stream import direct_logits
from ...lm.wrappers import measures_model
from ...models.linear_parts import decoder_rows
from ...models.modeling_transcoder import TranscoderModel
from .effects_results import FeatureEffect, FeatureEffects, TokenChanges


#: Tokens that the model gives a smaller probability, with and without the feature, are not listed.
MIN_PROBABILITY = 1e-4


@measures_model
@torch.no_grad()
def feature_effects_study(
    base_model: PreTrainedModel,
    dictionary: TranscoderModel,
    dataset: Iterable[Mapping],
    tokenizer: PreTrainedTokenizerBase,
    features: Sequence[int],
    *,
    num_contexts: int = 20,
    num_tokens: int = 10,
    max_rounds: int = 20,
    max_tokens: int = 20_000,
    batch_size: int = 8,
    skip_first: int = 1,
    special_token_ids: Sequence[int] | None = None,
    seed: int = 0,
) -> FeatureEffects:
    """
    Take features away at the tokens where they fire, and measure the change of the next-token logits there.

    What a feature writes is subtracted at its token, and the dictionary is asked again: features overlap, so it may still be
    active, and then the rest is subtracted too, until it is off. In a transcoder nothing has to be repeated, because it does
    not read what it writes. The change is compared with the direct path, the decoder row through the final norm's gain and
    the unembedding.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): A causal language model.
        dictionary ([`TranscoderModel`]): The dictionary, with one output site.
        dataset (`Iterable[Mapping]`): Rows with `input_ids`, as for [`TranscoderEvaluator`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer that decodes the tokens.
        features (`Sequence[int]`): Numbers of the features.
        num_contexts (`int`, *optional*, defaults to 20):
            Number of contexts of each feature, drawn from those with at least half of its largest activation.
        num_tokens (`int`, *optional*, defaults to 10): Number of tokens listed in each direction.
        max_rounds (`int`, *optional*, defaults to 20): Largest number of times that a feature is taken away.
        max_tokens, batch_size, skip_first, special_token_ids: Same as in [`TranscoderEvaluator`].
        seed (`int`, *optional*, defaults to 0): Seed of the draw of contexts.

    Returns:
        [`FeatureEffects`]

    Raises:
        [`TranscoderError`]: the dictionary does not fit the model or has no such feature, or the model has no logits.

    Source: Cunningham et al. (2023), arXiv 2309.08600, section 5, where ablation takes away less than a rank of the stream.
    """
    check_head(base_model)
    fitting_dictionaries(base_model, {"the dictionary": dictionary})
    check_features(features, dictionary.config.num_features)
    if len(dictionary.config.output_sites) != 1:
        raise TranscoderError("The dictionary writes at several sites: give one with a single output site.")
    features = list(dict.fromkeys(features))
    blocks = TokenBlocks(dataset, max_tokens=max_tokens, skip_first=skip_first, special_token_ids=special_token_ids)
    with in_eval_mode(base_model, dictionary):
        contexts = firing_contexts(
            base_model, dictionary, features, blocks, num_contexts, batch_size=batch_size, seed=seed
        )
        found = [feature for feature in features if contexts[feature]]
        effects = _effects(base_model, dictionary, found, contexts, tokenizer, num_tokens, max_rounds)
    return FeatureEffects(
        features=effects,
        silent=[feature for feature in features if not contexts[feature]],
        protocol={
            "model": base_model.config.name_or_path,
            "dtype": str(base_model.dtype).removeprefix("torch."),
            "reads": dictionary.config.input_site,
            "writes": dictionary.config.output_site,
            "text": f"{blocks.tokens} tokens",
            "contexts": f"up to {num_contexts} with at least half of the largest activation",
            "seed": seed,
        },
    )


def _effects(base_model, dictionary, features, contexts, tokenizer, num_tokens, max_rounds) -> list[FeatureEffect]:
    listed = [(place, context) for place, feature in enumerate(features) for context in contexts[feature]]
    if not listed:
        return []
    removed, rounds, active = _removals(base_model, dictionary, features, listed, max_rounds)
    vocabulary = vocabulary_size(base_model)
    change = torch.zeros(len(features), vocabulary, dtype=torch.float64)
    likely = torch.zeros(len(features), vocabulary)
    kl = torch.zeros(len(features), dtype=torch.float64)
    rows = [(place, context.tokens, amount) for (place, context), amount in zip(listed, removed.tolist(), strict=True)]
    for numbers, plain, ablated in ablated_predictions(base_model, dictionary, features, rows):
        places = torch.tensor([rows[number][0] for number in numbers])
        logs = [logits.float().log_softmax(-1) for logits in (plain, ablated)]
        difference = (ablated - plain).double().cpu()
        change.index_add_(0, places, difference - difference.mean(-1, keepdim=True))
        kl.index_add_(0, places, (logs[0].exp() * (logs[0] - logs[1])).sum(-1).double().cpu())
        highest = torch.maximum(*logs).exp().cpu()
        likely.scatter_reduce_(0, places[:, None].expand_as(highest), highest, "amax")
    place_of = torch.tensor([place for place, _ in listed])
    direct = _direct(base_model, dictionary, features)
    effects = []
    for place, feature in enumerate(features):
        mine = place_of == place
        its = contexts[feature]
        mean = change[place] / len(its)
        among = (likely[place] >= MIN_PROBABILITY).nonzero()[:, 0]
        path = None if direct is None else -direct[place]
        effects.append(
            FeatureEffect(
                feature=feature,
                contexts=len(its),
                example=its[0].to_text(tokenizer),
                activation=sum(context.activation for context in its) / len(its),
                removed=removed[mine].mean().item(),
                rounds=rounds[mine].float().mean().item(),
                still_active=active[mine].float().mean().item(),
                kl=kl[place].item() / len(its),
                raised=_extreme(mean, among, tokenizer, num_tokens, 1),
                lowered=_extreme(mean, among, tokenizer, num_tokens, -1),
                direct_raised=[] if path is None else _extreme(path, among, tokenizer, num_tokens, 1),
                direct_lowered=[] if path is None else _extreme(path, among, tokenizer, num_tokens, -1),
                spearman=_agreement(mean, path),
                spearman_likely=_agreement(mean[among], None if path is None else path[among]),
            )
        )
    return effects


def _removals(base_model, dictionary, features, listed, max_rounds):
    """For each context the activation to take away, the rounds that it takes, and whether the feature is active after them."""
    site = dictionary.config.input_site
    inputs = torch.zeros(len(listed), dictionary.config.d_in, device=dictionary.device)
    with capture(base_model, [site]) as activations:
        for batch in text_batches(base_model, [context.tokens for _, context in listed], 16):
            base_model(**batch.inputs)
            values = activations.of_tokens(site, batch.input_ids.shape)
            last = (torch.arange(len(batch.numbers)), torch.tensor(batch.lengths) - 1)
            inputs[batch.numbers] = values[last].to(inputs.device, inputs.dtype)
    numbers = torch.tensor([features[place] for place, _ in listed], device=dictionary.device)
    return removed_until_off(dictionary, inputs, numbers, max_rounds)


def removed_until_off(
    dictionary: TranscoderModel, inputs: torch.Tensor, features: torch.Tensor, max_rounds: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Subtracts what features write until they are off, all inputs at once.

    Args:
        dictionary ([`TranscoderModel`]): The dictionary.
        inputs (`torch.Tensor` of shape `(inputs, d_in)`): Activations at its input site.
        features (`torch.LongTensor` of shape `(inputs,)`): Feature of each input.
        max_rounds (`int`): Largest number of subtractions.

    Returns:
        `tuple`: for each input the sum of the activations that were taken away, the number of subtractions, and whether the
        feature is still active; of shape `(inputs,)`, on the CPU.
    """
    rows = decoder_rows(dictionary, features)
    repeats = dictionary.config.input_site == dictionary.config.output_site
    places = torch.arange(len(inputs), device=inputs.device)
    removed = torch.zeros(len(inputs), device=inputs.device)
    rounds = torch.zeros(len(inputs), dtype=torch.long, device=inputs.device)
    activation = dictionary.encode(inputs)[places, features].float()
    for _ in range(max_rounds):
        # Rounding leaves a feature that is off at a tiny activation.
        active = activation > 1e-5 * removed
        if not active.any():
            break
        taken = activation.where(active, 0)
        removed, rounds = removed + taken, rounds + active.long()
        if not repeats:
            activation = torch.zeros_like(activation)
            break
        inputs = inputs - taken[:, None] * rows
        activation = dictionary.encode(inputs)[places, features].float()
    return removed.cpu(), rounds.cpu(), (activation > 1e-5 * removed).cpu()


def _direct(base_model, dictionary, features):
    """Logits of the direct path of features, less their mean, `(features, vocabulary)`; `None` if there is no such path."""
    if why_no_logits(base_model, dictionary, output_site(dictionary)):
        return None
    logits = direct_logits(
        base_model, stream_rows(base_model, dictionary, torch.tensor(features, device=dictionary.device))
    )
    logits = logits.double().cpu()
    return logits - logits.mean(-1, keepdim=True)


def _agreement(change, path) -> float:
    # Without shuffles, whose p-value would need thousands of vocabularies in memory.
    return float("nan") if path is None else spearman_correlation(change, path, permutations=0)[0]


def _extreme(change, among, tokenizer, count, sign) -> TokenChanges:
    best = (sign * change[among]).topk(min(count, len(among)))
    ids = among[best.indices].tolist()
    return list(zip(token_texts(tokenizer, ids), (sign * best.values).tolist(), strict=True))
