"""Targets of attribution graphs: logits, differences of logits, features and directions."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from ...errors import TranscoderError
from ...lm.architectures import architecture_of
from ...lm.forwards import check_head
from ...lm.linear_maps import linear_rows, map_size, mean_row
from ...lm.sites import Site
from ...lm.stream import UNEMBEDDING
from ...models.linear_parts import decoder_rows, encoder_rows
from ...text import logging
from ...text.visible import visible
from ..prompt_tokens import token_labels
from .linear_run import READS, LinearRun
from .nodes import TargetInfo
from .read_vectors import FINAL, ReadVectors


logger = logging.get_logger(__name__)

# A target is questioned if it is this much more likely with or without a leading space.
_MUCH_MORE_LIKELY = 10
_FORMS = (["tokens"], ["dictionary", "feature"], ["vector"], ["vector", "site"])


@dataclass(frozen=True)
class Target:
    """One target of an attribution graph: a logit, a difference of two logits, a feature or a direction.

    Make it with [`Target.logit`], [`Target.difference`], [`Target.pre_activation`] or [`Target.direction`]. Functions that
    take targets accept a token (text or id) in place of its logit, and a pair of tokens in place of the difference of
    their logits.

    Args:
        tokens (`tuple`, *optional*): A token, or two tokens of which the second is subtracted, as text or id.
        dictionary (`str`, *optional*): Dictionary of a feature.
        feature (`int`, *optional*): Number of the feature in its dictionary.
        vector (`torch.Tensor` of shape `(width,)`, *optional*): A direction.
        site (`str`, *optional*): Site at which the direction is read. The output of the final norm by default.
        position (`int`, *optional*, defaults to -1): Position in the prompt; negative numbers count from the end.
        label (`str`, *optional*): Label of the target.
        weight (`float`, *optional*): Weight in the influence of nodes. A logit's probability by default, otherwise 1.

    Raises:
        [`TranscoderError`]: none of the three is given, or several, or a part of one.
    """

    tokens: tuple[str | int, ...] = ()
    dictionary: str | None = None
    feature: int | None = None
    vector: torch.Tensor | None = None
    site: str | None = None
    position: int = -1
    label: str | None = None
    weight: float | None = None

    def __post_init__(self):
        parts = [name for name in ("dictionary", "feature", "vector", "site") if getattr(self, name) is not None]
        if (["tokens"] if self.tokens else []) + parts not in _FORMS:
            raise TranscoderError(
                "A target is `tokens`, a `dictionary` with a `feature`, or a `vector` with or without a `site`: give one of "
                "the three."
            )
        if len(self.tokens) > 2:
            raise TranscoderError(f"A target has one or two tokens, not {len(self.tokens)}.")

    @classmethod
    def logit(cls, token: str | int, position: int = -1, weight: float | None = None) -> "Target":
        """The logit of a token minus the mean of all logits, which does not affect probabilities."""
        return cls(tokens=(token,), position=position, weight=weight)

    @classmethod
    def difference(cls, token: str | int, other: str | int, position: int = -1) -> "Target":
        """The logit of a token minus the logit of another."""
        return cls(tokens=(token, other), position=position)

    @classmethod
    def pre_activation(cls, dictionary: str, feature: int, position: int = -1) -> "Target":
        """The pre-activation of a feature, active or not."""
        return cls(dictionary=dictionary, feature=feature, position=position)

    @classmethod
    def direction(
        cls, vector: torch.Tensor, site: str | None = None, position: int = -1, label: str | None = None
    ) -> "Target":
        """A direction of the activation at a site, `(width,)`; without a site, of the input of the unembedding."""
        return cls(vector=vector, site=site, position=position, label=label)


@torch.no_grad()
def resolve_targets(
    run: LinearRun,
    targets: "Iterable[Target | str | int | tuple | torch.Tensor] | None",
    tokenizer: PreTrainedTokenizerBase | None,
    max_logits: int = 10,
    logit_mass: float = 0.95,
) -> tuple[ReadVectors, list[TargetInfo]]:
    """Resolve targets to read vectors of a run.

    Args:
        run ([`LinearRun`]): The run.
        targets (`Iterable`, *optional*): Targets, or tokens, pairs and vectors. The most likely next tokens by default.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Required for tokens given as text; otherwise used for labels only.
        max_logits (`int`, *optional*, defaults to 10): Largest number of tokens, without `targets`.
        logit_mass (`float`, *optional*, defaults to 0.95): Probability at which they are enough, without `targets`.

    Returns:
        `tuple`: the read vectors, and the [`TargetInfo`] of each.

    Raises:
        [`TranscoderError`]: a token, position, feature or site does not exist.
    """
    if targets is None and run.logits is None:
        targets = _strongest_features(run, max_logits)
    elif targets is None:
        targets = [Target.logit(token) for token in _likely(run.logits[-1], max_logits, logit_mass)]
    elif isinstance(targets, (str, int, Target, torch.Tensor)):
        targets = [targets]
    resolved = [_resolve(run, _as_target(target), tokenizer) for target in targets]
    if not resolved:
        raise TranscoderError("There are no targets: give at least one target.")
    layers, points, positions, vectors, biases, infos = zip(*resolved, strict=True)
    infos = [replace(info, layer=layer, point=point) for info, layer, point in zip(infos, layers, points, strict=True)]
    device = run.token_embedding.device
    width = max(len(vector) for vector in vectors)
    if any(len(vector) != width for vector in vectors):
        raise TranscoderError("The targets are read at places of different widths: make one graph for each width.")
    functionals = ReadVectors(
        layer=torch.tensor(layers, device=device),
        point=list(points),
        position=torch.tensor(positions, device=device),
        vector=torch.stack([vector.to(device) for vector in vectors]),
        bias=torch.tensor(biases, device=device),
    )
    return functionals, infos


def _as_target(target):
    if isinstance(target, Target):
        return target
    if isinstance(target, torch.Tensor) and target.dim() == 1:
        return Target.direction(target)
    if isinstance(target, (str, int)):
        return Target.logit(target)
    if isinstance(target, (tuple, list)) and len(target) == 2:
        return Target.difference(*target)
    raise TranscoderError(
        f"{target!r} is not a target: give a token, a pair of tokens for the difference of their logits, a vector, or a "
        "`Target`."
    )


def _likely(logits, most, mass):
    probabilities = logits.float().softmax(-1)
    top = probabilities.topk(min(most, len(probabilities)))
    reached = top.values.cumsum(0) >= mass
    count = int(reached.long().argmax()) + 1 if reached.any() else len(top.values)
    return top.indices[:count].tolist()


def _strongest_features(run, most):
    """The features of the last token with the largest outputs, as targets of a model without logits."""
    found: dict[tuple[str, int], float] = {}
    last = len(run.input_ids) - 1
    for site, part in ((site, part) for site, writer in run.writers.items() for part in writer.parts):
        active = part.position == last
        dictionary = run.dictionaries[part.dictionary]
        if not active.any() or run.input_sites[part.dictionary].point not in READS:
            continue
        features = part.feature[active]
        rows = decoder_rows(dictionary, features.to(dictionary.device), site)
        sizes = part.activation[active] * rows.norm(dim=1).to(part.activation.device)
        for size, feature in zip(sizes.tolist(), features.tolist(), strict=True):
            key = run.names[part.dictionary], feature
            found[key] = found.get(key, 0.0) + size
    if not found:
        raise TranscoderError(
            f"{type(run.model).__name__} has no language-model head and none of its features is active at the last token, so "
            "there are no targets: load the model with AutoModelForCausalLM, or give `targets`."
        )
    logger.warning(
        f"{type(run.model).__name__} has no language-model head, so the graph explains the strongest features of the last "
        "token; load the model with AutoModelForCausalLM to explain logits."
    )
    strongest = sorted(((size, *key) for key, size in found.items()), reverse=True)[:most]
    total = sum(size for size, _, _ in strongest)
    return [
        replace(Target.pre_activation(name, feature), weight=size / total if total > 0 else 1 / len(strongest))
        for size, name, feature in strongest
    ]


def _resolve(run, target, tokenizer):
    position = check_position(run, target.position)
    if target.tokens:
        return _resolve_tokens(run, target, position, tokenizer)
    if target.dictionary is not None:
        return _resolve_feature(run, target, position)
    layer, point = run.num_layers, FINAL
    width = run.token_embedding.shape[-1]
    if target.site is not None:
        site = Site.parse(target.site)
        if site.point not in READS or site.layer is None or site.layer >= run.num_layers:
            raise TranscoderError(
                f"A direction cannot be read at '{site}': choose one of {', '.join(READS)} of the layers 0 to "
                f"{run.num_layers - 1}."
            )
        if site.point == "resid_mid" and run.parallel:
            raise TranscoderError(f"'{site}' does not exist in this model; use resid_pre or resid_post.")
        layer, point = site.layer, site.point
    if target.vector.dim() != 1 or len(target.vector) != width:
        raise TranscoderError(
            f"The direction has the shape {tuple(target.vector.shape)}, but the activation there is {width} wide."
        )
    label = target.label or f"direction at {target.site or 'the final norm'}"
    info = TargetInfo(label, position, 1.0 if target.weight is None else target.weight)
    return layer, point, position, target.vector.float(), 0.0, info


def _resolve_tokens(run, target, position, tokenizer):
    check_head(run.model)
    head = run.model.get_output_embeddings()
    ids = [_token_id(token, tokenizer, map_size(head)[0]) for token in target.tokens]
    if len(ids) == 2 and ids[0] == ids[1]:
        raise TranscoderError(
            f"The target {target.tokens[0]!r} minus {target.tokens[1]!r} is always 0: give two different tokens."
        )
    probabilities = run.logits[position].float().softmax(-1)
    for token, token_id in zip(target.tokens, ids, strict=True):
        _warn_of_other_spelling(token, token_id, tokenizer, probabilities)
    multiplier = architecture_of(run.model).logit_multiplier
    tokens = linear_rows(head, torch.tensor(ids), UNEMBEDDING)
    rows = tokens.weight.float() * multiplier
    biases = [0.0] * len(ids) if tokens.bias is None else tokens.bias.float() * multiplier
    names = token_labels(ids, tokenizer)
    names = [name if name.strip() else visible(name) for name in names]
    if len(ids) == 2:
        vector = rows[0] - rows[1]
        constant = float(biases[0] - biases[1])
        # The leading space is left out, unless it is the only difference between the two.
        second = names[1] if names[0].strip() == names[1].strip() else names[1].lstrip()
        info = TargetInfo(target.label or f"{names[0]} - {second}", position, _or(target.weight, 1.0))
    else:
        mean = mean_row(head, UNEMBEDDING)
        vector = rows[0] - mean.weight[0] * multiplier
        constant = float(biases[0] - (0.0 if mean.bias is None else mean.bias[0] * multiplier))
        probability = float(probabilities[ids[0]])
        weight = _or(target.weight, probability)
        info = TargetInfo(target.label or names[0], position, weight, probability, ids[0])
    return run.num_layers, FINAL, position, vector, constant, info


def _resolve_feature(run, target, position):
    if target.dictionary not in run.names:
        raise TranscoderError(f"There is no dictionary '{target.dictionary}': choose from {', '.join(run.names)}.")
    number = run.names.index(target.dictionary)
    dictionary, site = run.dictionaries[number], run.input_sites[number]
    if not 0 <= target.feature < dictionary.config.num_features:
        raise TranscoderError(
            f"Feature {target.feature} does not exist: '{target.dictionary}' has the features 0 to "
            f"{dictionary.config.num_features - 1}."
        )
    if site.point not in READS:
        raise TranscoderError(f"The features of '{target.dictionary}' read '{site}', after an MLP: they end a graph.")
    rows, biases = encoder_rows(dictionary, torch.tensor([target.feature], device=dictionary.device))
    label = target.label or f"{target.dictionary} feature {target.feature}"
    info = TargetInfo(label, position, _or(target.weight, 1.0))
    return site.layer, site.point, position, rows[0], float(biases[0]), info


def check_position(run: LinearRun, position: int) -> int:
    """Position of a token, counted from the start of the prompt."""
    length = len(run.input_ids)
    if not -length <= position < length:
        raise TranscoderError(f"The prompt has the tokens 0 to {length - 1}, but token {position} was requested.")
    return position % length


def _token_id(token: str | int, tokenizer, vocabulary: int) -> int:
    if isinstance(token, int):
        if not 0 <= token < vocabulary:
            raise TranscoderError(f"Token {token} does not exist: the model has the tokens 0 to {vocabulary - 1}.")
        return token
    if tokenizer is None:
        raise TranscoderError(f"Give the tokenizer too, or token ids instead of texts such as {token!r}.")
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        parts = ", ".join(map(repr, token_labels(ids, tokenizer)))
        other = _other_spelling(token)
        meant = "give a single token, often one with a leading space."
        if other and len(tokenizer.encode(other, add_special_tokens=False)) == 1:
            meant = f"did you mean {other!r}?"
        raise TranscoderError(f"{token!r} is not one token of this model but {len(ids)} ({parts}): {meant}")
    return ids[0]


def _other_spelling(token):
    """The token with a leading space if it has none, and without it if it has one."""
    return token[1:] if token.startswith(" ") else f" {token}"


def _warn_of_other_spelling(token, token_id, tokenizer, probabilities):
    """Warn where the token is hardly predicted, but is with or without a leading space."""
    if isinstance(token, int) or not (other := _other_spelling(token)):
        return
    ids = tokenizer.encode(other, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == token_id:
        return
    found, more = float(probabilities[token_id]), float(probabilities[ids[0]])
    if more > _MUCH_MORE_LIKELY * found:
        logger.warning(
            f"The target {token!r} has a probability of {found:.2g}, and {other!r} one of {more:.2g}: did you mean {other!r}?"
        )


def _or(value, default):
    return default if value is None else value
