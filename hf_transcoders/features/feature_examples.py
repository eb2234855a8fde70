"""What single features respond to, and what they make the model say."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.token_blocks import TokenBlocks
from ..data.token_texts import token_texts
from ..dictionaries import check_fits
from ..errors import TranscoderError
from ..lm.architectures import architecture_of
from ..lm.capture import capture
from ..lm.devices import input_device
from ..lm.linear_maps import map_size
from ..lm.modes import in_eval_mode
from ..lm.order import direct_logits, writes_to_stream, written_directions
from ..lm.sites import Site
from ..lm.wrappers import measures_model
from ..models.linear_parts import decoder_rows
from ..models.modeling_transcoder import TranscoderModel
from ..text.printable import printable


logger = logging.get_logger(__name__)

# Elements of the largest temporary, the features of some blocks.
_MAX_ELEMENTS = 2**23


@dataclass
class FeatureContext:
    """A place where a feature fires.

    Args:
        tokens (`list[str]`): Texts of the tokens around the peak.
        activations (`list[float]`): The feature's activation on each of them.
        peak (`int`): Which of them is the peak.
        row (`int`): Block of the dataset.
        position (`int`): Position of the peak among the tokens of the block, padding left out.
    """

    tokens: list[str]
    activations: list[float]
    peak: int
    row: int
    position: int


@dataclass
class FeatureExplanation:
    """What one feature responds to and promotes.

    Args:
        index (`int`): Number of the feature.
        density (`float`): Share of tokens it fires on.
        max_activation (`float`): Its largest activation.
        mean_activation (`float`): Its mean activation over the tokens it fires on.
        contexts (`list[FeatureContext]`): Where it fires most, strongest first, at most one per block.
        top_tokens, bottom_tokens (`list[tuple[str, float]]`):
            The tokens whose logits it raises and lowers most per unit of activation, through the final norm's gain and
            the unembedding (the norm's scale and everything in between are left out). Empty, and a warning says why, where
            the dictionary does not write to the residual stream or the model's family is not registered.
    """

    index: int
    density: float
    max_activation: float
    mean_activation: float
    contexts: list[FeatureContext]
    top_tokens: list[tuple[str, float]]
    bottom_tokens: list[tuple[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)

    def render(self) -> str:
        """Plain text for a terminal, each peak in `[[ ]]`."""
        lines = [
            f"feature {self.index}: fires on {self.density:.3%} of tokens, max {self.max_activation:.3g}, "
            f"mean {self.mean_activation:.3g}"
        ]
        for name, tokens in (("raises", self.top_tokens), ("lowers", self.bottom_tokens)):
            if tokens:
                lines.append(f"  {name}: " + ", ".join(f"{token!r} {value:+.2f}" for token, value in tokens))
        for context in self.contexts:
            texts = [f"[[{text}]]" if i == context.peak else text for i, text in enumerate(context.tokens)]
            lines.append(
                f"  {context.activations[context.peak]:8.3f}  " + printable("".join(texts).replace("\n", "⏎"))
            )
        return "\n".join(lines)


@measures_model
@torch.no_grad()
def explain_features(
    base_model: PreTrainedModel,
    dictionary: TranscoderModel,
    dataset: Iterable[Mapping],
    tokenizer: PreTrainedTokenizerBase,
    *,
    features: Sequence[int] | Literal["active"] | None = None,
    num_features: int = 10,
    num_contexts: int = 5,
    window: int = 10,
    num_tokens: int = 10,
    max_tokens: int = 100_000,
    batch_size: int = 8,
    skip_first: int = 1,
    special_token_ids: Sequence[int] | None = None,
    progress: bool = True,
) -> list[FeatureExplanation]:
    """Find the contexts in which features fire most, and the tokens they promote.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            The causal language model.
        dictionary ([`TranscoderModel`]):
            The dictionary.
        dataset (`Iterable[Mapping]`):
            Rows with `input_ids` and, where they are padded, `attention_mask`, as for [`TranscoderEvaluator`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Turns tokens back to text.
        features (`Sequence[int]` or `"active"`, *optional*):
            Which features: those listed; all that fire; or by default `num_features` of those that fire in enough
            blocks, evenly spaced from the most to the least frequent.
        num_features (`int`, *optional*, defaults to 10):
            How many to choose when `features` is not given.
        num_contexts (`int`, *optional*, defaults to 5):
            Contexts per feature.
        window (`int`, *optional*, defaults to 10):
            Tokens shown on each side of a peak.
        num_tokens (`int`, *optional*, defaults to 10):
            Promoted and suppressed tokens per feature.
        max_tokens (`int`, *optional*, defaults to 100,000):
            Tokens to search.
        batch_size (`int`, *optional*, defaults to 8):
            Blocks per forward.
        skip_first (`int`, *optional*, defaults to 1):
            Tokens at the start of every block on which activations do not count.
        special_token_ids (`Sequence[int]`, *optional*):
            Tokens on which activations do not count.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[FeatureExplanation]`: in the order of `features`, or from frequent to rare.

    Raises:
        [`TranscoderError`]: a feature does not exist, or none fires on the dataset.
    """
    return explain_dictionaries(
        base_model, {"The dictionary": dictionary}, dataset, tokenizer, features={"The dictionary": features}, num_features=num_features,
        num_contexts=num_contexts, window=window, num_tokens=num_tokens, max_tokens=max_tokens, batch_size=batch_size,
        skip_first=skip_first, special_token_ids=special_token_ids, progress=progress,
    )["The dictionary"]  # fmt: skip


@measures_model
@torch.no_grad()
def explain_dictionaries(
    base_model: PreTrainedModel,
    dictionaries: Mapping[str, TranscoderModel],
    dataset: Iterable[Mapping],
    tokenizer: PreTrainedTokenizerBase,
    *,
    features: Mapping[str, Sequence[int] | Literal["active"] | None],
    num_features: int = 10,
    num_contexts: int = 5,
    window: int = 10,
    num_tokens: int = 10,
    max_tokens: int = 100_000,
    batch_size: int = 8,
    skip_first: int = 1,
    special_token_ids: Sequence[int] | None = None,
    progress: bool = True,
) -> dict[str, list[FeatureExplanation]]:
    """[`explain_features`] for several dictionaries, which share the forwards of the base model.

    Args:
        dictionaries (`Mapping[str, TranscoderModel]`): The dictionaries.
        features (`Mapping[str, Sequence[int] | "active" | None]`):
            Dictionary -> which of its features; dictionaries that are not named are left out.
        base_model, dataset, tokenizer, num_features, num_contexts, window, num_tokens, max_tokens, batch_size, skip_first,
        special_token_ids, progress:
            As for [`explain_features`].

    Returns:
        `dict[str, list[FeatureExplanation]]`: by dictionary.

    Raises:
        [`TranscoderError`]: a feature does not exist, or none of those to choose from fires on the dataset.
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
    dictionaries = {name: dictionaries[name] for name in features}
    check_fits(base_model, dictionaries)
    listed = {}
    for name, dictionary in dictionaries.items():
        wanted, size = features[name], dictionary.config.num_features
        listed[name] = None if wanted is None or wanted == "active" else list(wanted)
        if unknown := [index for index in listed[name] or [] if not 0 <= index < size]:
            raise TranscoderError(
                f"Feature {unknown[0]} does not exist: this dictionary has the features 0 to {size - 1}."
            )
    blocks = TokenBlocks(dataset, max_tokens=max_tokens, skip_first=skip_first, special_token_ids=special_token_ids)
    with in_eval_mode(base_model, *dictionaries.values()):
        peaks = {}
        for name, dictionary in dictionaries.items():
            numbers = range(dictionary.config.num_features) if listed[name] is None else listed[name]
            peaks[name] = _Peaks(numbers, num_contexts, dictionary.device)
        steps = -(-len(blocks.texts) // batch_size)
        for batch in tqdm(blocks.batches(base_model, batch_size), "features", steps, disable=not progress):
            inputs = _inputs(base_model, dictionaries.values(), batch)
            for name, dictionary in dictionaries.items():
                for some_rows, activations in _activations(dictionary, inputs, batch, peaks[name].features):
                    peaks[name].update(activations, some_rows)
        chosen = {}
        for name, its_peaks in peaks.items():
            count = None if features[name] else num_features
            chosen[name] = range(len(listed[name])) if listed[name] is not None else its_peaks.choose(count)
            if not chosen[name]:
                raise TranscoderError(
                    "No feature fires on this dataset; search more tokens or check the dictionary's sites."
                )
        contexts = _contexts(base_model, dictionaries, blocks, peaks, chosen, tokenizer, window, batch_size)
        return {
            name: _explanations(
                peaks[name],
                chosen[name],
                contexts[name],
                _promoted_tokens(
                    base_model, dictionary, [peaks[name].features[i] for i in chosen[name]], tokenizer, num_tokens
                ),
                blocks.tokens,
            )
            for name, dictionary in dictionaries.items()
        }


def _explanations(peaks, chosen, contexts, promoted, tokens):
    fired, total, largest = (tensor[chosen].tolist() for tensor in (peaks.fired, peaks.total, peaks.values[0]))
    raised, lowered = promoted
    return [
        FeatureExplanation(
            index=peaks.features[i],
            density=fired[j] / tokens,
            max_activation=largest[j],
            mean_activation=total[j] / max(fired[j], 1),
            contexts=contexts[j],
            top_tokens=raised[j],
            bottom_tokens=lowered[j],
        )
        for j, i in enumerate(chosen)
    ]


@dataclass
class FeaturePeaks:
    """Where the features of a dictionary fire most: enough to name any of them later, without the model.

    Args:
        values (`torch.Tensor` of shape `(num_contexts, num_features)`): Largest activations, at most one per block.
        rows, positions (`torch.LongTensor` of shape `(num_contexts, num_features)`): The tokens they are on.
    """

    values: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor

    def label(
        self, feature: int, texts: Sequence[torch.Tensor], tokenizer: PreTrainedTokenizerBase, window: int = 6
    ) -> str | None:
        """The tokens a feature fires most on, and the strongest of them in its context, in `[[ ]]`.

        Args:
            feature (`int`): The feature.
            texts (`Sequence[torch.LongTensor]`): The tokens of each block that was searched.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Turns tokens back to text.
            window (`int`, *optional*, defaults to 6): Tokens shown on each side.

        Returns:
            `str`, or `None` where the feature never fired.
        """
        peaks = [
            (row, position)
            for value, row, position in zip(
                *(tensor[:, feature].tolist() for tensor in (self.values, self.rows, self.positions)), strict=True
            )
            if value > 0
        ]
        if not peaks:
            return None
        tokens = dict.fromkeys(token_texts(tokenizer, [int(texts[row][position]) for row, position in peaks]))
        row, position = peaks[0]
        start = max(0, position - window)
        context = token_texts(tokenizer, texts[row][start : position + window + 1].tolist())
        context[position - start] = f"[[{context[position - start]}]]"
        return (", ".join(map(repr, tokens)) + ": " + "".join(context)).replace("\n", "⏎")


@measures_model
@torch.no_grad()
def find_peaks(
    base_model: PreTrainedModel,
    dictionaries: Mapping[str, TranscoderModel],
    blocks: TokenBlocks,
    *,
    num_contexts: int = 3,
    batch_size: int = 8,
) -> dict[str, FeaturePeaks]:
    """Find where every feature of some dictionaries fires most, with one forward for all of them.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): The causal language model.
        dictionaries (`Mapping[str, TranscoderModel]`): The dictionaries.
        blocks ([`TokenBlocks`]): The blocks to search.
        num_contexts (`int`, *optional*, defaults to 3): Places kept for each feature.
        batch_size (`int`, *optional*, defaults to 8): Blocks per forward.

    Returns:
        `dict[str, FeaturePeaks]`: by dictionary, on the CPU.
    """
    peaks = {name: _Peaks(range(d.config.num_features), num_contexts, d.device) for name, d in dictionaries.items()}
    with in_eval_mode(base_model, *dictionaries.values()):
        for batch in blocks.batches(base_model, batch_size):
            inputs = _inputs(base_model, dictionaries.values(), batch)
            for name, dictionary in dictionaries.items():
                for some_rows, activations in _activations(dictionary, inputs, batch, peaks[name].features):
                    peaks[name].update(activations, some_rows)
    return {name: FeaturePeaks(p.values.cpu(), p.rows.cpu(), p.positions.cpu()) for name, p in peaks.items()}


class _Peaks:
    """For each feature, its largest activations so far, at most one per block, and where they are."""

    def __init__(self, features: Iterable[int], k: int, device: torch.device):
        self.features = list(features)
        shape = (k, len(self.features))
        self.values = torch.zeros(shape, device=device)
        self.rows = torch.zeros(shape, dtype=torch.long, device=device)
        self.positions = torch.zeros(shape, dtype=torch.long, device=device)
        self.fired = torch.zeros(shape[1], dtype=torch.long, device=device)
        self.total = torch.zeros(shape[1], device=device)

    def update(self, activations, rows):
        """Take in `activations (blocks, seq, features)` of some blocks."""
        self.fired += activations.count_nonzero((0, 1))
        self.total += activations.sum((0, 1))
        values, positions = activations.max(1)
        rows = rows.to(values.device).unsqueeze(-1).expand_as(positions)
        self.values, order = torch.cat([self.values, values]).topk(len(self.values), dim=0)
        self.rows = torch.cat([self.rows, rows]).gather(0, order)
        self.positions = torch.cat([self.positions, positions]).gather(0, order)

    def choose(self, count: int | None) -> list[int]:
        """Features that fire, from frequent to rare: all, or some evenly spaced (with full contexts, if possible)."""
        order = self.fired.argsort(descending=True, stable=True)
        firing = order[self.fired[order] > 0]
        if count is None or len(firing) <= count:
            return firing.tolist()
        full = firing[self.values[-1, firing] > 0]
        candidates = full if len(full) >= count else firing
        return candidates[torch.linspace(0, len(candidates) - 1, count, device=order.device).round().long()].tolist()


def _inputs(base_model, dictionaries, batch) -> dict[Site, torch.Tensor]:
    """What some dictionaries read in some blocks, `(blocks, seq, d_in)` by site, from one forward."""
    sites = {Site.parse(dictionary.config.input_site) for dictionary in dictionaries}
    with capture(base_model, sites) as captured:
        base_model(**batch.inputs)
        return {site: captured.of_tokens(site, batch.input_ids.shape) for site in captured}


def _activations(dictionary, inputs, batch, features) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Numbers of some blocks and `(blocks, seq, features)` activations there, 0 where tokens do not count."""
    rows = torch.tensor(batch.numbers)
    inputs = inputs[Site.parse(dictionary.config.input_site)].to(dictionary.device)
    some = max(1, _MAX_ELEMENTS // (inputs.shape[1] * dictionary.config.num_features))
    every = features == list(range(dictionary.config.num_features))
    for part, part_rows, mask in zip(inputs.split(some), rows.split(some), batch.mask.split(some), strict=True):
        activations = dictionary.encode(part).float()
        if not every:
            activations = activations[..., features]
        yield part_rows, activations.where(mask.to(activations.device).unsqueeze(-1), 0)


def _contexts(base_model, dictionaries, blocks, peaks, chosen, tokenizer, window, batch_size):
    """Contexts of the chosen features of each dictionary; the few blocks they lie in are run once more."""
    # Block -> dictionary -> (which of the chosen, rank, position of the peak).
    wanted: dict[int, dict[str, list[tuple[int, int, int]]]] = {}
    for name, its_peaks in peaks.items():
        places = (its_peaks.values, its_peaks.rows, its_peaks.positions)
        places = zip(*(tensor[:, chosen[name]].T.tolist() for tensor in places), strict=True)
        for j, (its_values, its_rows, its_positions) in enumerate(places):
            for rank, (value, row, position) in enumerate(zip(its_values, its_rows, its_positions, strict=True)):
                if value > 0:
                    wanted.setdefault(row, {}).setdefault(name, []).append((j, rank, position))
    found = {name: [{} for _ in numbers] for name, numbers in chosen.items()}
    for batch in blocks.batches(base_model, batch_size, sorted(wanted)):
        inputs = _inputs(base_model, dictionaries.values(), batch)
        for name, dictionary in dictionaries.items():
            features = [peaks[name].features[i] for i in chosen[name]]
            for some_rows, activations in _activations(dictionary, inputs, batch, features):
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


def _promoted_tokens(base_model, dictionary, features, tokenizer, count):
    site = Site.parse(dictionary.config.output_site)
    if why_not := _why_no_logits(base_model, dictionary, site):
        logger.warning_once(f"The tokens that features promote are left out: {why_not}.")
        return [[] for _ in features], [[] for _ in features]
    rows = decoder_rows(dictionary, torch.tensor(features, device=dictionary.device)).to(input_device(base_model))
    if site.module is None:
        rows = written_directions(base_model, site, rows)
    logits = direct_logits(base_model, rows)
    count = min(count, logits.shape[-1])
    return tuple(
        [
            list(zip(token_texts(tokenizer, ids), values, strict=True))
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        for best in (logits.topk(count), logits.topk(count, largest=False))
    )


def _why_no_logits(base_model, dictionary, site) -> str | None:
    """Why what a dictionary writes cannot be taken through the final norm and the unembedding, or `None` where it can."""
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
        return f"'{site}' is {width} wide, and what the unembedding reads {map_size(head)[1]}"
    return None
