"""Explain features by the contexts of their top activations and the tokens that they promote."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, overload

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.token_blocks import TokenBlocks
from ..data.token_texts import token_texts
from ..dictionaries import Dictionaries, check_fits, named_dictionaries
from ..errors import TranscoderError
from ..lm.modes import in_eval_mode
from ..lm.wrappers import measures_model
from ..models.modeling_transcoder import TranscoderModel
from ..text.printable import printable
from ..text.visible import visible
from .promoted_tokens import promoted_tokens
from .top_activations import RunningTop, dictionary_inputs, feature_activations, update_all


# Name of a single dictionary in messages.
_SINGLE = "The dictionary"

Features = Sequence[int] | Literal["active"] | None


@dataclass
class FeatureContext:
    """A text on which a feature fires.

    Args:
        tokens (`list[str]`): Texts of the tokens around the activation.
        activations (`list[float]`): Activation of the feature on each of them.
        peak (`int`): Index of the strongest activation among them.
        row (`int`): Number of the block in the dataset.
        position (`int`): Position of the strongest activation in the block, without padding.
    """

    tokens: list[str]
    activations: list[float]
    peak: int
    row: int
    position: int


@dataclass
class FeatureExplanation:
    """Contexts and promoted tokens of one feature.

    Args:
        feature (`int`): Number of the feature.
        density (`float`): Share of tokens the feature fires on.
        max_activation (`float`): Largest activation.
        mean_activation (`float`): Mean activation over the tokens the feature fires on.
        contexts (`list[FeatureContext]`): Contexts of the top activations, strongest first, at most one per block.
        top_tokens, bottom_tokens (`list[tuple[str, float]]`):
            Tokens whose logits the feature raises and lowers most per unit of activation, through the final norm's gain and
            the unembedding (the norm's scale and everything in between are left out). Empty, with a warning, where the
            dictionary does not write to the residual stream or the model's family is not registered.
    """

    feature: int
    density: float
    max_activation: float
    mean_activation: float
    contexts: list[FeatureContext]
    top_tokens: list[tuple[str, float]]
    bottom_tokens: list[tuple[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """The explanation as plain values."""
        return asdict(self)

    def to_text(self) -> str:
        """The explanation as text for a terminal, with each strongest token in `[[ ]]`."""
        lines = [
            f"feature {self.feature}: fires on {self.density:.3%} of tokens, max {self.max_activation:.3g}, "
            f"mean {self.mean_activation:.3g}"
        ]
        for name, tokens in (("raises", self.top_tokens), ("lowers", self.bottom_tokens)):
            if tokens:
                lines.append(f"  {name}: " + ", ".join(f"{token!r} {value:+.2f}" for token, value in tokens))
        for context in self.contexts:
            tokens = [visible(token, in_text=True) for token in context.tokens]
            texts = [f"[[{text}]]" if i == context.peak else text for i, text in enumerate(tokens)]
            lines.append(f"  {context.activations[context.peak]:8.3f}  " + printable("".join(texts)))
        return "\n".join(lines)

    __str__ = to_text


@overload
def explain_features(
    base_model: PreTrainedModel, dictionaries: TranscoderModel, *args: Any, **kwargs: Any
) -> list[FeatureExplanation]: ...
@overload
def explain_features(
    base_model: PreTrainedModel, dictionaries: Dictionaries, *args: Any, **kwargs: Any
) -> dict[str, list[FeatureExplanation]]: ...
@measures_model
@torch.no_grad()
def explain_features(
    base_model: PreTrainedModel,
    dictionaries: Dictionaries,
    dataset: Iterable[Mapping],
    tokenizer: PreTrainedTokenizerBase,
    *,
    features: Features | Mapping[str, Features] = None,
    num_features: int = 10,
    num_contexts: int = 5,
    window: int = 10,
    num_tokens: int = 10,
    max_tokens: int = 100_000,
    batch_size: int = 8,
    skip_first: int = 1,
    special_token_ids: Sequence[int] | None = None,
    progress: bool = True,
) -> list[FeatureExplanation] | dict[str, list[FeatureExplanation]]:
    """Find the contexts of the top activations of features, and the tokens they promote.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        dictionaries ([`TranscoderModel`], [`TranscoderSet`], a mapping from name to dictionary, or a list):
            One dictionary or several, which share the forward passes of the base model.
        dataset (`Iterable[Mapping]`):
            Rows with `input_ids` and, if they are padded, `attention_mask`, as for [`TranscoderEvaluator`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that decodes the tokens.
        features (`Sequence[int]` or `"active"`, *optional*):
            Numbers of the features to explain, or `"active"` for all that fire. By default `num_features` of those that fire
            in enough blocks, evenly spaced from the most to the least frequent. For several dictionaries a mapping from name
            to these; dictionaries that it does not name are left out.
        num_features (`int`, *optional*, defaults to 10):
            Number of features to choose when `features` is not given.
        num_contexts (`int`, *optional*, defaults to 5):
            Number of contexts per feature.
        window (`int`, *optional*, defaults to 10):
            Number of tokens shown on each side of the strongest activation.
        num_tokens (`int`, *optional*, defaults to 10):
            Number of promoted and of suppressed tokens per feature.
        max_tokens (`int`, *optional*, defaults to 100,000):
            Number of tokens to search.
        batch_size (`int`, *optional*, defaults to 8):
            Number of blocks per forward pass.
        skip_first (`int`, *optional*, defaults to 1):
            Number of tokens at the start of every block whose activations do not count.
        special_token_ids (`Sequence[int]`, *optional*):
            Tokens whose activations do not count.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[FeatureExplanation]` for one dictionary, in the order of `features` or from frequent to rare;
        `dict[str, list[FeatureExplanation]]` by name for several.

    Raises:
        [`TranscoderError`]: a feature does not exist, or no feature fires on the dataset.
    """
    for name, value, least in (
        ("num_features", num_features, 1),
        ("num_contexts", num_contexts, 1),
        ("window", window, 0),
        ("num_tokens", num_tokens, 0),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise TranscoderError(f"`{name}` is {value}; give at least {least}.")
    single = isinstance(dictionaries, TranscoderModel)
    named = {_SINGLE: dictionaries} if single else named_dictionaries(dictionaries)
    wanted = _wanted({_SINGLE: features} if single else features, named)
    named = {name: named[name] for name in wanted}
    check_fits(base_model, named)
    blocks = TokenBlocks(dataset, max_tokens=max_tokens, skip_first=skip_first, special_token_ids=special_token_ids)
    with in_eval_mode(base_model, *named.values()):
        running = {}
        for name, dictionary in named.items():
            listed = _listed(wanted[name])
            numbers = range(dictionary.config.num_features) if listed is None else listed
            running[name] = RunningTop(numbers, num_contexts, dictionary)
        steps = -(-len(blocks.texts) // batch_size)
        for batch in tqdm(blocks.batches(base_model, batch_size), "features", steps, disable=not progress):
            update_all(running, base_model, batch)
        chosen = {}
        for name, top in running.items():
            listed, count = _listed(wanted[name]), None if wanted[name] else num_features
            chosen[name] = top.choose(count) if listed is None else range(len(listed))
            if not chosen[name]:
                raise TranscoderError(
                    "No feature fires on this dataset: search more tokens, or check the dictionary's sites."
                )
        contexts = _contexts(base_model, blocks, running, chosen, tokenizer, window, batch_size)
        found = {}
        for name, top in running.items():
            numbers = [top.features[i] for i in chosen[name]]
            promoted = promoted_tokens(base_model, named[name], numbers, tokenizer, num_tokens)
            found[name] = _explanations(top, chosen[name], contexts[name], promoted, blocks.tokens)
    return found[_SINGLE] if single else found


def _wanted(features, named) -> dict[str, Features]:
    """Name of a dictionary -> the wanted features of it."""
    if features is None or features == "active":
        features = dict.fromkeys(named, features)
    if not isinstance(features, Mapping):
        raise TranscoderError("Give the features of several dictionaries as a mapping from name to features.")
    if unknown := [name for name in features if name not in named]:
        raise TranscoderError(f"There is no dictionary '{unknown[0]}': choose from {', '.join(named)}.")
    for name, its_features in features.items():
        size = named[name].config.num_features
        if isinstance(its_features, Mapping):
            raise TranscoderError("Give the features of a single dictionary as a list, without its name.")
        if unknown := [feature for feature in _listed(its_features) or [] if not 0 <= feature < size]:
            raise TranscoderError(
                f"Feature {unknown[0]} does not exist: this dictionary has the features 0 to {size - 1}."
            )
    return dict(features)


def _listed(features: Features) -> list[int] | None:
    """The numbers of the wanted features, or `None` if they are to be found."""
    return None if features is None or features == "active" else list(features)


def _explanations(top, chosen, contexts, promoted, tokens):
    fired, total, largest = (tensor[chosen].tolist() for tensor in (top.fired, top.total, top.values[0]))
    raised, lowered = promoted
    return [
        FeatureExplanation(
            feature=top.features[i],
            density=fired[j] / tokens,
            max_activation=largest[j],
            mean_activation=total[j] / max(fired[j], 1),
            contexts=contexts[j],
            top_tokens=raised[j],
            bottom_tokens=lowered[j],
        )
        for j, i in enumerate(chosen)
    ]


def _contexts(base_model, blocks, running, chosen, tokenizer, window, batch_size):
    """Contexts of the chosen features of each dictionary; the few blocks with these are run once more."""
    # Block -> dictionary -> (which of the chosen, rank, position of the activation).
    wanted: dict[int, dict[str, list[tuple[int, int, int]]]] = {}
    for name, top in running.items():
        places = (top.values, top.rows, top.positions)
        places = zip(*(tensor[:, chosen[name]].T.tolist() for tensor in places), strict=True)
        for j, (its_values, its_rows, its_positions) in enumerate(places):
            for rank, (value, row, position) in enumerate(zip(its_values, its_rows, its_positions, strict=True)):
                if value > 0:
                    wanted.setdefault(row, {}).setdefault(name, []).append((j, rank, position))
    found = {name: [{} for _ in numbers] for name, numbers in chosen.items()}
    for batch in blocks.batches(base_model, batch_size, sorted(wanted)):
        inputs = dictionary_inputs(base_model, [top.dictionary for top in running.values()], batch)
        for name, top in running.items():
            features = [top.features[i] for i in chosen[name]]
            for some_rows, activations in feature_activations(top.dictionary, inputs, batch, features):
                activations = activations.cpu()
                for number, row in enumerate(some_rows.tolist()):
                    for j, rank, position in wanted[row].get(name, ()):
                        start, end = max(0, position - window), min(position + window + 1, len(blocks.texts[row]))
                        found[name][j][rank] = FeatureContext(
                            tokens=token_texts(tokenizer, blocks.texts[row][start:end].tolist()),
                            activations=activations[number, start:end, j].tolist(),
                            peak=position - start,
                            row=row,
                            position=position,
                        )
    return {name: [[by_rank[rank] for rank in sorted(by_rank)] for by_rank in its] for name, its in found.items()}
