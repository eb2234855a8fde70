"""Blind case studies without a human: predict from weights alone when features are active, and score it on text."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...circuits.weights.feature_weights import FeatureWeights
from ...data.token_blocks import TokenBlocks
from ...data.token_texts import token_texts
from ...errors import TranscoderError
from ...lm.capture import capture
from ...lm.modes import in_eval_mode
from ...lm.sites import input_site
from ...lm.wrappers import measures_model
from ...models.modeling_transcoder import TranscoderModel
from ...models.transcoder_set import TranscoderSet
from ...text.columns import aligned
from ...text.printable import printable
from .auroc import auroc, bootstrap_auroc
from .hypotheses import TokenHypotheses, token_hypotheses


# Features of a random sample are active on at least this many tokens and on no more than half of them.
MIN_FIRINGS = 20
# Elements of the largest temporary tensor.
_MAX_ELEMENTS = 2**23


@dataclass(frozen=True)
class BlindFeature:
    """Hypothesis about one feature, and how well it predicts when the feature is active.

    AUROC is the probability that a token on which the feature is active has a higher score than one on which it is not.

    Args:
        index (`int`): Number of the feature.
        firings (`int`): Number of tokens of the held-out text on which it is active.
        tokens (`list[str]`): Current tokens with the highest scores.
        preceding_tokens (`list[str]`): Preceding tokens with the highest scores.
        heads (`list[tuple[int, int]]`): Heads through which preceding tokens are read, `(layer, head)`.
        auroc (`float`, *optional*): AUROC of the hypothesis. `None`, like the following, if the feature is never active.
        interval (`tuple[float, float]`, *optional*): 95% bootstrap interval of the AUROC over blocks of text.
        parts (`dict[str, float]`): AUROC of the parts of the hypothesis: `embedding`, `current`, `preceding`.
        null_mean (`float`, *optional*): Mean AUROC of the hypotheses of other features for this feature.
        p_value (`float`, *optional*): Share of hypotheses, its own included, with at least the AUROC of its own.
    """

    index: int
    firings: int
    tokens: list[str]
    preceding_tokens: list[str]
    heads: list[tuple[int, int]]
    auroc: float | None
    interval: tuple[float, float] | None
    parts: dict[str, float]
    null_mean: float | None
    p_value: float | None


@dataclass(frozen=True)
class BlindStudy:
    """Results of [`blind_study`].

    Args:
        dictionary (`str`): Name of the dictionary.
        features (`list[BlindFeature]`): Results of each feature.
        mean_interval (`tuple[float, float]`, *optional*): 95% bootstrap interval of the mean AUROC over blocks of text.
        protocol (`dict`): Measurement protocol.
    """

    dictionary: str
    features: list[BlindFeature]
    mean_interval: tuple[float, float] | None
    protocol: dict[str, Any]

    @property
    def measured(self) -> list[BlindFeature]:
        """Features that are active on some tokens and not on others."""
        return [feature for feature in self.features if feature.auroc is not None]

    def summary(self) -> dict[str, float]:
        """Mean and median AUROC of the measured features, means of the parts and of the baseline, and shares that pass."""
        measured = self.measured
        if not measured:
            return {}
        return {
            "features": len(measured),
            "mean_auroc": statistics.fmean(feature.auroc for feature in measured),
            "median_auroc": statistics.median(feature.auroc for feature in measured),
            **{
                f"mean_{part}_auroc": statistics.fmean(feature.parts[part] for feature in measured)
                for part in measured[0].parts
            },
            "mean_null_auroc": statistics.fmean(feature.null_mean for feature in measured),
            "share_above_chance": statistics.fmean(feature.interval[0] > 0.5 for feature in measured),
            "share_beating_null": statistics.fmean(feature.p_value <= 0.05 for feature in measured),
        }

    def summary_lines(self) -> list[str]:
        """Format the summary and the protocol as sentences."""
        summary = self.summary()
        if not summary:
            return [f"None of the {len(self.features)} features is active on some of the tokens and not on others."]
        protocol, layers = self.protocol, self.protocol["layers_with_a_dictionary_before"]
        return [
            f"{summary['features']:.0f} features of {self.dictionary}: mean AUROC {summary['mean_auroc']:.3f} "
            "({:.3f} to {:.3f}), ".format(*self.mean_interval)
            + f"median {summary['median_auroc']:.3f}",
            f"parts: embedding {summary['mean_embedding_auroc']:.3f}, current {summary['mean_current_auroc']:.3f}, "
            f"preceding {summary['mean_preceding_auroc']:.3f}; null {summary['mean_null_auroc']:.3f}",
            f"above chance {summary['share_above_chance']:.0%}, better than 95% of the hypotheses of other features "
            f"{summary['share_beating_null']:.0%}",
            f"{protocol['tokens']:,} tokens in {protocol['blocks']} blocks; features {protocol['chosen']}; dictionaries of "
            f"{len(layers)} earlier layers; {protocol['heads']} heads, {protocol['window']} tokens back; "
            f"{protocol['null_features']} null features; seed {protocol['seed']}",
        ]

    def to_text(self) -> str:
        """Format all features and the summary as text for a terminal."""
        return "\n".join([aligned(*self.rows(), left=0), "", *map(printable, self.summary_lines())])

    __str__ = to_text

    def to_dict(self) -> dict[str, Any]:
        """Return all results as JSON values."""
        return {
            "dictionary": self.dictionary,
            "summary": self.summary(),
            "mean_interval": self.mean_interval,
            "features": [asdict(feature) for feature in self.features],
            "protocol": self.protocol,
        }

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows of a table, the best hypotheses first."""
        head = [
            "feature",
            "active on",
            "AUROC",
            "95% interval",
            "embedding",
            "current",
            "preceding",
            "null",
            "p",
            "tokens",
        ]
        rows = []
        for feature in sorted(self.features, key=lambda feature: -1 if feature.auroc is None else -feature.auroc):
            numbers = ["-"] * 7
            if feature.auroc is not None:
                parts = [f"{feature.parts[part]:.3f}" for part in ("embedding", "current", "preceding")]
                interval = "{:.3f} to {:.3f}".format(*feature.interval)
                numbers = [
                    f"{feature.auroc:.3f}",
                    interval,
                    *parts,
                    f"{feature.null_mean:.3f}",
                    f"{feature.p_value:.3f}",
                ]
            tokens = " ".join(map(repr, feature.tokens[:5]))
            rows.append([str(feature.index), str(feature.firings), *numbers, tokens])
        return head, rows


@measures_model
@torch.no_grad()
def blind_study(
    base_model: PreTrainedModel,
    transcoders: TranscoderModel | TranscoderSet | Mapping[str, TranscoderModel] | Iterable[TranscoderModel],
    dictionary: str,
    dataset: Iterable[Mapping],
    tokenizer: PreTrainedTokenizerBase,
    *,
    features: Sequence[int] | None = None,
    num_features: int = 50,
    num_heads: int = 8,
    window: int = 16,
    null_features: int = 100,
    bootstrap_samples: int = 200,
    num_tokens: int = 10,
    max_tokens: int = 20_000,
    batch_size: int = 8,
    skip_first: int = 1,
    special_token_ids: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> BlindStudy:
    """Predict from weights alone when features are active, and score the predictions on held-out text.

    In the blind case studies of arXiv 2406.11944 (§5.2), people guessed the meaning of features from circuits without
    seeing text. Here, the guess is a score for every token, without fitted parameters:

    - *embedding*: contribution of the embedding of the current token to the pre-activation;
    - *current*: the same, with the outputs of dictionaries of earlier layers for that embedding alone. MLPs without a
      dictionary add nothing;
    - *preceding*: mean contribution through the `num_heads` heads with the largest `||W_OV^T W_enc||`, if each attended
      equally to the `window` preceding tokens;
    - the hypothesis is the sum of *current* and *preceding*, in units of the pre-activation.

    The hypothesis ignores attention patterns, so contributions through attention are hardly predicted: the *preceding*
    part alone is a weak predictor.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        transcoders ([`TranscoderSet`], `Mapping[str, TranscoderModel]` or `Iterable[TranscoderModel]`):
            Dictionaries of the model. Those of earlier layers contribute to the hypotheses.
        dictionary (`str`):
            Name of the dictionary to study.
        dataset (`Iterable[Mapping]`):
            Held-out text as rows with `input_ids` and, if they are padded, `attention_mask`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        features (`Sequence[int]`, *optional*):
            Features to study. By default, a random sample of `num_features` among those that are active on at least 20
            tokens of the text and on no more than half of them. Hypotheses depend on the text only through this choice.
        num_features (`int`, *optional*, defaults to 50):
            Number of features to sample if `features` is not given.
        num_heads (`int`, *optional*, defaults to 8):
            Heads per hypothesis; 0 ignores preceding tokens.
        window (`int`, *optional*, defaults to 16):
            Number of preceding tokens that count.
        null_features (`int`, *optional*, defaults to 100):
            Number of other features, sampled at random, whose hypotheses are the baseline.
        bootstrap_samples (`int`, *optional*, defaults to 200):
            Bootstrap samples of blocks for each interval.
        num_tokens (`int`, *optional*, defaults to 10):
            Number of tokens with the highest scores to return for each hypothesis.
        max_tokens (`int`, *optional*, defaults to 20,000):
            Number of tokens to score.
        batch_size (`int`, *optional*, defaults to 8):
            Blocks per forward pass.
        skip_first (`int`, *optional*, defaults to 1):
            Number of positions to leave out at the start of each block.
        special_token_ids (`Sequence[int]`, *optional*):
            Tokens that are not scored and contribute nothing to later ones.
        seed (`int`, *optional*, defaults to 0):
            Seed for all random choices.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Returns:
        [`BlindStudy`]

    Raises:
        [`TranscoderError`]: The dictionary or a feature does not exist, the dictionary does not read the residual stream,
            or no feature is active often enough.
    """
    sizes = {"window": window, "null_features": null_features, "bootstrap_samples": bootstrap_samples}
    _check_sizes(num_features=num_features, num_tokens=num_tokens, **sizes)
    if num_heads < 0:
        raise TranscoderError(f"num_heads is {num_heads}: give 0 or more.")
    if features is not None and not len(features):
        raise TranscoderError("`features` is empty: list some features, or leave it out.")
    weights = FeatureWeights(base_model, transcoders)
    studied = weights.dictionary(dictionary)
    # Refuses unknown features and sites that cannot be predicted before anything is computed.
    weights.reads(dictionary, [0] if features is None else features)
    blocks = TokenBlocks(dataset, max_tokens=max_tokens, skip_first=skip_first, special_token_ids=special_token_ids)
    inputs = _inputs(base_model, studied, blocks, batch_size, progress)
    generator = torch.Generator().manual_seed(seed)
    chosen = _sample(studied, inputs, num_features, generator) if features is None else list(features)
    others = [feature for feature in range(studied.config.num_features) if feature not in set(chosen)]
    if not others:
        raise TranscoderError(
            "All features of the dictionary are studied, so no other feature is left for the baseline: study fewer."
        )
    order = torch.randperm(len(others), generator=generator)[:null_features].tolist()
    others = [others[place] for place in order]
    fires = torch.cat([part[:, chosen] > 0 for part in _activations(studied, inputs)]).T.contiguous().cpu()

    hypotheses = token_hypotheses(weights, dictionary, [*chosen, *others], num_heads, progress)
    scores = _scores(hypotheses, blocks, window, special_token_ids)

    own = {part: score[: len(chosen)] for part, score in scores.items()}
    areas = {part: auroc(score, fires).diagonal() for part, score in own.items()}
    null = auroc(scores["hypothesis"][len(chosen) :], fires)
    groups = torch.arange(len(blocks.texts))[:, None].expand_as(blocks.mask)[blocks.mask]
    samples = bootstrap_auroc(own["hypothesis"], fires, groups, bootstrap_samples, seed)
    firings, top = fires.sum(-1).tolist(), _top_texts(hypotheses, tokenizer, len(chosen), num_tokens)
    found = []
    for number in range(len(chosen)):
        measured = 0 < firings[number] < fires.shape[1]
        found.append(
            BlindFeature(
                index=chosen[number],
                firings=firings[number],
                tokens=top[0][number],
                preceding_tokens=top[1][number] if hypotheses.heads[number] else [],
                heads=hypotheses.heads[number],
                auroc=areas["hypothesis"][number].item() if measured else None,
                interval=_interval(samples[:, number]) if measured else None,
                parts={part: areas[part][number].item() for part in areas if part != "hypothesis"} if measured else {},
                null_mean=null[:, number].mean().item() if measured else None,
                p_value=_p_value(areas["hypothesis"][number], null[:, number]) if measured else None,
            )
        )
    means = samples[:, [0 < firing < fires.shape[1] for firing in firings]].nanmean(-1)
    return BlindStudy(
        dictionary=dictionary,
        features=found,
        mean_interval=_interval(means) if len(means) and not means.isnan().all() else None,
        protocol={
            "base_model": base_model.config.name_or_path or None,
            "base_model_dtype": str(base_model.dtype).removeprefix("torch."),
            "layers_with_a_dictionary_before": hypotheses.mlp_layers,
            "tokens": blocks.tokens,
            "blocks": len(blocks.texts),
            "sequence_length": max(blocks.lengths),
            "heads": num_heads,
            "window": window,
            "null_features": len(others),
            "bootstrap_samples": bootstrap_samples,
            "chosen": "given"
            if features is not None
            else f"at random among those active on at least {MIN_FIRINGS} tokens",
            "seed": seed,
        },
    )


def _check_sizes(**sizes):
    for name, size in sizes.items():
        if size < 1:
            raise TranscoderError(f"{name} is {size}: give a number of at least 1.")


def _inputs(model, dictionary, blocks, batch_size, progress) -> torch.Tensor:
    """Inputs of the dictionary at the scored tokens, block by block, `(tokens, d_in)`."""
    site, found = input_site(dictionary), {}
    with in_eval_mode(model), capture(model, site) as activations:
        batches = blocks.batches(model, batch_size)
        for batch in tqdm(batches, desc="text", total=-(-len(blocks.texts) // batch_size), disable=not progress):
            model(**batch.inputs)
            parts = activations[site][batch.mask].to(dictionary.device).split(batch.mask.sum(1).tolist())
            found.update(zip(batch.numbers, parts, strict=True))
    return torch.cat([found[number] for number in sorted(found)])


def _activations(dictionary, inputs):
    """Yield features of `inputs (tokens, d_in)`, some tokens at a time."""
    with in_eval_mode(dictionary):
        for rows in inputs.split(max(1, _MAX_ELEMENTS // dictionary.config.num_features)):
            yield dictionary.encode(rows)


def _sample(dictionary, inputs, count, generator) -> list[int]:
    firings = sum((part > 0).sum(0) for part in _activations(dictionary, inputs)).cpu()  # pyright: ignore[reportAttributeAccessIssue]
    often = ((firings >= MIN_FIRINGS) & (firings <= len(inputs) / 2)).nonzero().flatten()
    if not len(often):
        raise TranscoderError(
            f"No feature is active on at least {MIN_FIRINGS} and at most half of the {len(inputs)} tokens: give more text."
        )
    return often[torch.randperm(len(often), generator=generator)[:count]].sort().values.tolist()


def _scores(hypotheses: TokenHypotheses, blocks, window, special_token_ids) -> dict[str, torch.Tensor]:
    """Scores of the hypothesis and of its parts at the scored tokens, `(features, tokens)`."""
    ids, mask = blocks.input_ids, blocks.mask
    special = torch.isin(ids, torch.tensor(list(special_token_ids or []), dtype=torch.long))
    # Sums over all tokens before each one, so that a window is a difference.
    before = lambda values: torch.nn.functional.pad(values.double().cumsum(-1), (1, 0))  # noqa: E731
    end = torch.arange(ids.shape[1])
    start = (end - window).clamp(min=0)
    counts = before(~special)
    counts = (counts[:, end] - counts[:, start]).clamp(min=1)
    parts = {"hypothesis": [], "embedding": [], "current": [], "preceding": []}
    # A few features at a time, since scores of all tokens are large in double precision.
    size = max(1, _MAX_ELEMENTS // ids.numel())
    for first in range(0, len(hypotheses.features), size):
        chosen = slice(first, first + size)
        sums = before(hypotheses.preceding[chosen][:, ids].masked_fill(special, 0))
        preceding = ((sums[..., end] - sums[..., start]) / counts).float()
        current = hypotheses.current[chosen][:, ids]
        parts["embedding"].append(hypotheses.embedding[chosen][:, ids][:, mask])
        parts["current"].append(current[:, mask])
        parts["preceding"].append(preceding[:, mask])
        parts["hypothesis"].append((current + hypotheses.scale[ids] * preceding)[:, mask])
    return {name: torch.cat(each) for name, each in parts.items()}


def _top_texts(hypotheses, tokenizer, count, num_tokens) -> list[list[list[str]]]:
    return [
        [token_texts(tokenizer, row) for row in table[:count].topk(num_tokens).indices.tolist()]
        for table in (hypotheses.current, hypotheses.preceding)
    ]


def _interval(samples) -> tuple[float, float]:
    low, high = samples.nanquantile(torch.tensor([0.025, 0.975], dtype=samples.dtype)).tolist()
    return low, high


def _p_value(area, null) -> float:
    return (1 + (null >= area).sum().item()) / (1 + len(null))
