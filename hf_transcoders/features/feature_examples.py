"""Explain features by the contexts of their top activations and the tokens that they promote."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, overload

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.token_texts import token_texts
from ..dictionaries import Dictionaries, check_fits, named_dictionaries
from ..errors import TranscoderError
from ..lm.inputs import check_tokens
from ..lm.modes import in_eval_mode
from ..lm.wrappers import measures_model
from ..models.modeling_transcoder import TranscoderModel
from ..text.printable import printable
from ..text.visible import visible
from .activation_histograms import ActivationHistogram, RunningHistograms
from .measured_change import MeasuredChange, measured_changes
from .promoted_tokens import promoted_tokens
from .sampled_activations import SampledTop
from .text_sample import sample_text
from .top_activations import dictionary_inputs, feature_activations, update_all


# Name of a single dictionary in messages.
_SINGLE = "The dictionary"

Features = Sequence[int] | Literal["active"] | None


@dataclass
class FeatureContext:
    """A text on which a feature is active.

    Args:
        tokens (`list[str]`): Texts of the tokens around the activation.
        activations (`list[float]`): Activation of the feature on each of them.
        peak (`int`): Index among them of the activation that the context is for.
        row (`int`): Row of the dataset.
        position (`int`): Position of this activation in the row, without padding.
    """

    tokens: list[str]
    activations: list[float]
    peak: int
    row: int
    position: int

    def to_text(self) -> str:
        """The activation and the text, for a terminal, with the token of the activation in `[[ ]]`."""
        tokens = [visible(token, in_text=True) for token in self.tokens]
        texts = [f"[[{text}]]" if i == self.peak else text for i, text in enumerate(tokens)]
        return f"  {self.activations[self.peak]:8.3f}  " + printable("".join(texts))


@dataclass
class FeatureExplanation:
    """Contexts and promoted tokens of one feature.

    Args:
        feature (`int`): Number of the feature.
        density (`float`): Share of tokens the feature is active on.
        max_activation (`float`): Largest activation.
        mean_activation (`float`): Mean activation over the tokens the feature is active on.
        contexts (`list[FeatureContext]`):
            Contexts of the top activations, strongest first, from different blocks and documents and with different tokens.
        top_tokens, bottom_tokens (`list[tuple[str, float]]`):
            Tokens that the feature promotes and suppresses most on its direct path, with their z-scores over features: see
            [`~hf_transcoders.features.promoted_tokens.promoted_tokens`]. Empty, with a warning, where the dictionary does not
            write to the residual stream or the model's family is not registered.
        histogram ([`~hf_transcoders.features.activation_histograms.ActivationHistogram`], *optional*):
            How often the feature fires how strongly.
        quantile_contexts (`dict[str, list[FeatureContext]]`):
            Quantiles of the activations on the tokens the feature is active on, strongest first ("75-100%", "50-75%",
            "25-50%", "0-25%") -> contexts of random activations in them.
        measured ([`~hf_transcoders.features.measured_change.MeasuredChange`], *optional*):
            What ablating the feature changes in the model's predictions at its top contexts.
    """

    feature: int
    density: float
    max_activation: float
    mean_activation: float
    contexts: list[FeatureContext]
    top_tokens: list[tuple[str, float]]
    bottom_tokens: list[tuple[str, float]]
    histogram: ActivationHistogram | None = None
    quantile_contexts: dict[str, list[FeatureContext]] = field(default_factory=dict)
    measured: MeasuredChange | None = None

    def to_dict(self) -> dict[str, Any]:
        """The explanation as plain values."""
        return {**asdict(self), "token_scores": "direct path, z-score over features"}

    def to_text(self) -> str:
        """The explanation as text for a terminal, with each strongest token in `[[ ]]`."""
        lines = [
            f"feature {self.feature}: active on {self.density:.3%} of tokens, max {self.max_activation:.3g}, "
            f"mean {self.mean_activation:.3g}"
        ]
        for name, tokens in (("promotes", self.top_tokens), ("suppresses", self.bottom_tokens)):
            if tokens:
                lines.append(f"  direct path {name} (z): {_listed_tokens(tokens, '+.1f')}")
        if self.measured is not None:
            lines += self._measured_lines(self.measured)
        lines += [context.to_text() for context in self.contexts]
        for name, contexts in self.quantile_contexts.items():
            lines += [f"{context.to_text()}  ({name})" for context in contexts]
        return "\n".join(lines)

    __str__ = to_text

    def _measured_lines(self, measured):
        listed = [
            f"{name} {_listed_tokens(tokens, '+.2f')}"
            for name, tokens in (("raises", measured.raised), ("lowers", measured.lowered))
            if tokens
        ]
        where = "the top context" if measured.contexts == 1 else f"{measured.contexts} top contexts"
        changes = "; ".join(listed) or "no log-probability changes by more than rounding"
        return [f"  measured at {where} (KL {measured.kl:.2g}): {changes}"]


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
    num_quantile_contexts: int = 1,
    num_measured: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> list[FeatureExplanation] | dict[str, list[FeatureExplanation]]:
    """Find contexts of features in a sample of all of a text, the tokens they promote, and their effects in the model.

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
            Number of tokens to search, in rows drawn from all of the dataset. A dataset that can only be read in order is read
            from its start.
        batch_size (`int`, *optional*, defaults to 8):
            Number of blocks per forward pass.
        skip_first (`int`, *optional*, defaults to 1):
            Number of tokens at the start of every block whose activations do not count.
        special_token_ids (`Sequence[int]`, *optional*):
            Tokens whose activations do not count.
        num_quantile_contexts (`int`, *optional*, defaults to 1):
            Number of contexts for each quarter of a feature's activations, besides the top ones.
        num_measured (`int`, *optional*, defaults to 3):
            Number of top contexts at which each feature is ablated in the model, to measure the change of its predictions.
        seed (`int`, *optional*, defaults to 0):
            Seed of the sample.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[FeatureExplanation]` for one dictionary, in the order of `features` or from frequent to rare;
        `dict[str, list[FeatureExplanation]]` by name for several, with an empty list where no feature fires.

    Raises:
        [`TranscoderError`]: a feature does not exist, or no feature of any dictionary is active on the dataset.
    """
    for name, value, least in (
        ("num_features", num_features, 1),
        ("num_contexts", num_contexts, 1),
        ("window", window, 0),
        ("num_tokens", num_tokens, 0),
        ("batch_size", batch_size, 1),
        ("num_quantile_contexts", num_quantile_contexts, 0),
        ("num_measured", num_measured, 0),
    ):
        if value < least:
            raise TranscoderError(f"`{name}` is {value}; give at least {least}.")
    single = isinstance(dictionaries, TranscoderModel)
    named = {_SINGLE: dictionaries} if single else named_dictionaries(dictionaries)
    wanted = _wanted({_SINGLE: features} if single else features, named)
    named = {name: named[name] for name in wanted}
    check_fits(base_model, named)
    sample = sample_text(
        dataset,
        max_tokens=max_tokens,
        skip_first=skip_first,
        special_token_ids=special_token_ids,
        separator=getattr(tokenizer, "eos_token_id", None),
        seed=seed,
    )
    blocks = sample.blocks
    check_tokens(base_model, blocks.texts, "Row", sample.rows)
    with in_eval_mode(base_model, *named.values()):
        running = {}
        for name, dictionary in named.items():
            listed = _listed(wanted[name])
            numbers = range(dictionary.config.num_features) if listed is None else listed
            running[name] = SampledTop(numbers, num_contexts, dictionary, sample, quantiles=num_quantile_contexts > 0)
            running[name].histograms = RunningHistograms(len(numbers), dictionary.device)
        steps = -(-len(blocks.texts) // batch_size)
        for batch in tqdm(blocks.batches(base_model, batch_size), "features", steps, disable=not progress):
            update_all(running, base_model, batch)
        chosen = {}
        for name, top in running.items():
            listed, count = _listed(wanted[name]), None if wanted[name] else num_features
            chosen[name] = top.choose(count) if listed is None else range(len(listed))
        if not any(map(len, chosen.values())):
            raise TranscoderError(
                "No feature is active on this dataset: search more tokens, or check the dictionary's sites."
            )
        found = {name: [] for name in running}
        running = {name: top for name, top in running.items() if len(chosen[name])}
        places = {name: [top.places(i, num_quantile_contexts) for i in chosen[name]] for name, top in running.items()}
        contexts = _contexts(base_model, sample, running, chosen, places, tokenizer, window, batch_size)
        for name, top in running.items():
            numbers = [top.features[i] for i in chosen[name]]
            promoted = promoted_tokens(base_model, named[name], numbers, tokenizer, num_tokens)
            ablated_at = {}
            for feature, i, its in zip(numbers, chosen[name], places[name], strict=True):
                tops = zip(top.values[:num_measured, i].tolist(), its[None][:num_measured], strict=False)
                ablated_at[feature] = [(blocks.texts[block][: at + 1], value) for value, (block, at) in tops]
            measured = measured_changes(base_model, named[name], ablated_at, tokenizer, num_tokens)
            found[name] = _explanations(top, chosen[name], contexts[name], promoted, measured, blocks.tokens)
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


def _listed_tokens(tokens, form):
    return ", ".join(f"{token!r} {value:{form}}" for token, value in tokens)


def _listed(features: Features) -> list[int] | None:
    """The numbers of the wanted features, or `None` if they are to be found."""
    return None if features is None or features == "active" else list(features)


def _explanations(top, chosen, contexts, promoted, measured, tokens):
    fired, total, largest = (tensor[chosen].tolist() for tensor in (top.fired, top.total, top.values[0]))
    raised, lowered = promoted
    return [
        FeatureExplanation(
            feature=top.features[i],
            density=fired[j] / tokens,
            max_activation=largest[j],
            mean_activation=total[j] / max(fired[j], 1),
            contexts=contexts[j].pop(None),
            top_tokens=raised[j],
            bottom_tokens=lowered[j],
            histogram=top.histograms.histogram(i),
            quantile_contexts=contexts[j],
            measured=measured.get(top.features[i]),
        )
        for j, i in enumerate(chosen)
    ]


def _contexts(base_model, sample, running, chosen, places, tokenizer, window, batch_size):
    """Contexts at the places of the chosen features of each dictionary; the few blocks with these are run once more."""
    # Block -> dictionary -> (which of the chosen, the name of its places, number among these, position).
    wanted: dict[int, dict[str, list[tuple[int, str | None, int, int]]]] = {}
    found = {}
    for name, of_chosen in places.items():
        found[name] = [{group: [None] * len(its) for group, its in each.items()} for each in of_chosen]
        for j, each in enumerate(of_chosen):
            for group, its in each.items():
                for number, (block, position) in enumerate(its):
                    wanted.setdefault(block, {}).setdefault(name, []).append((j, group, number, position))
    texts = sample.blocks.texts
    for batch in sample.blocks.batches(base_model, batch_size, sorted(wanted)):
        inputs = dictionary_inputs(base_model, [top.dictionary for top in running.values()], batch)
        for name, top in running.items():
            features = [top.features[i] for i in chosen[name]]
            for some_blocks, activations in feature_activations(top.dictionary, inputs, batch, features):
                activations = activations.cpu()
                for i, block in enumerate(some_blocks.tolist()):
                    for j, group, number, position in wanted[block].get(name, ()):
                        start, end = max(0, position - window), min(position + window + 1, len(texts[block]))
                        found[name][j][group][number] = FeatureContext(
                            tokens=token_texts(tokenizer, texts[block][start:end].tolist()),
                            activations=activations[i, start:end, j].tolist(),
                            peak=position - start,
                            row=sample.rows[block],
                            position=position,
                        )
    return found
