"""Explain features by the contexts of their top activations and the tokens that they promote."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.token_texts import token_texts
from ..dictionaries import Dictionaries, check_features, check_fits, named_dictionaries
from ..errors import TranscoderError
from ..lm.inputs import check_tokens
from ..lm.modes import in_eval_mode
from ..lm.wrappers import measures_model
from ..models.modeling_transcoder import TranscoderModel
from ..text.printable import printable
from ..text.visible import visible
from .activation_histograms import ActivationHistogram
from .collect import read_all
from .examples import ExampleText, ExampleWindow, FeatureExamples
from .measured_change import MeasuredChange, measured_changes
from .promoted_tokens import promoted_tokens
from .running_examples import ExampleSizes, RunningExamples
from .text_sample import sample_text


# Quantiles of the activations of a feature, and random activations that stand for all of them: four in each.
_QUANTILES, _DRAWN = 4, 16
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
    sizes = ExampleSizes(
        window=2 * window + 1,
        top=num_contexts,
        random_tokens=_DRAWN if num_quantile_contexts else 0,
        random_windows=0,
        interval=0,
        silent=0,
        neighbors=0,
        same_token=0,
        sketch=0,
    )
    with in_eval_mode(base_model, *named.values()):
        running = {}
        for name, dictionary in named.items():
            listed = _listed(wanted[name])
            numbers = range(dictionary.config.num_features) if listed is None else listed
            running[name] = RunningExamples(numbers, dictionary, sample, sizes)
        read_all(base_model, running, sample, batch_size, progress=progress)
        chosen = {}
        for name, top in running.items():
            listed, count = _listed(wanted[name]), None if wanted[name] else num_features
            chosen[name] = top.choose(count) if listed is None else range(len(listed))
        if not any(map(len, chosen.values())):
            raise TranscoderError(
                "No feature is active on this dataset: search more tokens, or check the dictionary's sites."
            )
        found = {name: [] for name in running}
        text = ExampleText.of(sample)
        for name, each in running.items():
            if not len(chosen[name]):
                continue
            numbers = [each.features[i] for i in chosen[name]]
            examples = FeatureExamples.of(each, text)
            promoted = promoted_tokens(base_model, named[name], numbers, tokenizer, num_tokens)
            top = examples.groups["top"]
            ablated_at = {
                feature: [
                    (blocks.texts[block][: position + 1], value)
                    for value, block, position in zip(
                        *(tensor[i, :num_measured].tolist() for tensor in (top.values, top.rows, top.positions)),
                        strict=True,
                    )
                    if value > 0
                ]
                for feature, i in zip(numbers, chosen[name], strict=True)
            }
            measured = measured_changes(base_model, named[name], ablated_at, tokenizer, num_tokens)
            raised, lowered = promoted
            for i, feature, top_tokens, bottom_tokens in zip(chosen[name], numbers, raised, lowered, strict=True):
                quantiles = examples.quantiles(i, _QUANTILES, num_quantile_contexts) if num_quantile_contexts else {}
                found[name].append(
                    FeatureExplanation(
                        feature=feature,
                        density=int(examples.fired[i]) / examples.num_tokens,
                        max_activation=float(examples.max_activation[i]),
                        mean_activation=float(examples.mean_activation[i]),
                        contexts=_contexts(examples.windows(i, "top"), tokenizer, window),
                        top_tokens=top_tokens,
                        bottom_tokens=bottom_tokens,
                        histogram=examples.histogram(i),
                        quantile_contexts={
                            quantile: _contexts(windows, tokenizer, window) for quantile, windows in quantiles.items()
                        },
                        measured=measured.get(feature),
                    )
                )
    return found[_SINGLE] if single else found


def _contexts(windows: Sequence[ExampleWindow], tokenizer, side: int) -> list[FeatureContext]:
    """Contexts of examples, with some tokens on each side."""
    contexts = []
    for window in windows:
        start, end = max(0, window.peak - side), window.peak + side + 1
        contexts.append(
            FeatureContext(
                tokens=token_texts(tokenizer, window.tokens[start:end]),
                activations=window.activations[start:end],
                peak=window.peak - start,
                row=window.row,
                position=window.position,
            )
        )
    return contexts


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
        check_features(_listed(its_features) or (), size)
    return dict(features)


def _listed_tokens(tokens, form):
    return ", ".join(f"{token!r} {value:{form}}" for token, value in tokens)


def _listed(features: Features) -> list[int] | None:
    """The numbers of the wanted features, or `None` if they are to be found."""
    return None if features is None or features == "active" else list(features)
