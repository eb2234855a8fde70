"""Examples and counts of all features of a dictionary, as found in one pass over text."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..dictionaries import check_features
from ..errors import TranscoderError
from .activation_histograms import ActivationHistogram, histogram_of
from .running_examples import NUM_INTERVALS, SILENT_GROUPS, ExampleSizes, RunningExamples
from .running_group import window_start
from .text_sample import TextSample


# Correlated features that are kept of each feature.
_CORRELATED = 10
# Standard errors of an estimated correlation from which it is kept: below, the largest of thousands of features is chance.
_STANDARD_ERRORS = 4.0
# Elements of the largest temporary, the correlations of some features with all.
_MAX_ELEMENTS = 2**24


@dataclass(frozen=True)
class ExampleWindow:
    """A window of text on which a feature fires, or is silent.

    Args:
        tokens (`list[int]`): Token ids.
        activations (`list[float]`): Activation of the feature on each token, 0 on tokens that did not count.
        peak (`int`): Index of the token that the example is for; of a silent window, 0.
        row (`int`): Row of the dataset.
        start (`int`): Position of the first token in the row, without padding.
        documents (`tuple[int, ...]`): Numbers of the documents that its tokens belong to, the one of the token at `peak` first.
    """

    tokens: list[int]
    activations: list[float]
    peak: int
    row: int
    start: int
    documents: tuple[int, ...]

    @property
    def document(self) -> int:
        """Number of the document that the token at `peak` belongs to."""
        return self.documents[0]

    @property
    def value(self) -> float:
        """Activation on the token that the example is for."""
        return self.activations[self.peak]

    @property
    def position(self) -> int:
        """Position in the row of the token that the example is for."""
        return self.start + self.peak


@dataclass(frozen=True)
class Interval:
    """An interval of the activations of a feature, one of several of equal width.

    Args:
        low, high (`float`): Its ends; activations above `low`, up to and including `high`, are in it.
        count (`int`): Number of tokens with an activation in it.
        windows (`list[ExampleWindow]`): Examples at random ones of these tokens.
    """

    low: float
    high: float
    count: int
    windows: list[ExampleWindow]


@dataclass
class ExampleText:
    """The text that was read.

    Args:
        tokens (`torch.IntTensor` of shape `(tokens,)`): Token ids of all rows, one after the other.
        documents (`torch.IntTensor` of shape `(tokens,)`): Number of the document of each token.
        offsets (`torch.LongTensor` of shape `(rows + 1,)`): Where each row begins in these.
        rows (`torch.LongTensor` of shape `(rows,)`): Number of each row in the dataset.
    """

    tokens: torch.Tensor
    documents: torch.Tensor
    offsets: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, sample: TextSample) -> "ExampleText":
        """The text of a sample, with its documents numbered from 0."""
        texts = sample.blocks.texts
        lengths = torch.tensor([len(text) for text in texts])
        inside = torch.arange(sample.documents.shape[1]) < lengths[:, None]
        documents = torch.unique(sample.documents[inside], return_inverse=True)[1]
        return cls(
            tokens=torch.cat(texts).int(),
            documents=documents.int(),
            offsets=torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
            rows=torch.tensor(list(sample.rows)),
        )

    def __len__(self):
        return len(self.rows)

    def row(self, number: int) -> torch.Tensor:
        """Token ids `(tokens,)` of a row that was read."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]


@dataclass
class ExampleGroup:
    """Examples of one kind of all features, in the columns of the second dimension; a value or score of 0 is none.

    Args:
        scores, values (`torch.FloatTensor` of shape `(features, ..., examples)`): What the examples were chosen by, and the
            activation that each is for.
        rows, positions (`torch.IntTensor` of the same shape): Where these are in the [`ExampleText`].
        windows (`torch.HalfTensor` of shape `(features, ..., examples, window)`): Activations in the window, as shares of
            `values`; of windows in which the feature is silent, of width 0.
    """

    scores: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    windows: torch.Tensor


@dataclass
class FeatureExamples:
    """
    Examples and counts of all features of one dictionary.

    Made by [`collect_examples`], written by [`save_examples`] and read by [`load_examples`].

    Args:
        text ([`ExampleText`]): The text, which dictionaries of one pass share.
        sizes ([`ExampleSizes`]): What was kept of each feature.
        num_tokens (`int`): Number of tokens that count.
        groups (`dict[str, ExampleGroup]`): Name of a group, as in [`ExampleSizes`] -> its examples.
        bins (`torch.IntTensor` of shape `(features, 128)`): Number of tokens with activations in bins of equal width.
        exponents (`torch.IntTensor` of shape `(features,)`): All bins of a feature together reach up to 2 to this power.
        squares (`torch.DoubleTensor` of shape `(features,)`): Sum of squared activations.
        position_counts, position_sums (`torch.Tensor` of shape `(features, 24)`): Number of tokens on which a feature fires,
            and the sum of its activations, at positions 0, 1-2, 3-6, 7-14 and so on.
        position_tokens (`torch.LongTensor` of shape `(24,)`): Number of tokens that count at these positions.
        correlated (`torch.IntTensor` of shape `(features, 10)`): Most correlated other features, or -1.
        correlations (`torch.FloatTensor` of shape `(features, 10)`): Their Pearson correlations over all tokens, estimated
            with a standard error of `correlation_error`.
    """

    text: ExampleText
    sizes: ExampleSizes
    num_tokens: int
    groups: dict[str, ExampleGroup]
    bins: torch.Tensor
    exponents: torch.Tensor
    squares: torch.Tensor
    position_counts: torch.Tensor
    position_sums: torch.Tensor
    position_tokens: torch.Tensor
    correlated: torch.Tensor
    correlations: torch.Tensor

    @classmethod
    def of(cls, running: RunningExamples, text: ExampleText) -> "FeatureExamples":
        """What was collected so far, on the CPU."""
        groups = {}
        for name, group in running.groups.items():
            tensors = {part: getattr(group, part).cpu().clone() for part in group.STATE}
            if name == "interval":
                tensors = {part: each.unflatten(0, (-1, NUM_INTERVALS)) for part, each in tensors.items()}
            groups[name] = ExampleGroup(**tensors)
        num_tokens = int(running.position_tokens.sum())
        found = cls(
            text=text,
            sizes=running.sizes,
            num_tokens=num_tokens,
            groups=groups,
            bins=running.histograms.counts.cpu().clone(),
            exponents=running.histograms.exponent.cpu().clone(),
            squares=running.squares.cpu().double(),
            position_counts=running.position_counts.cpu().clone(),
            position_sums=running.position_sums.cpu().double(),
            position_tokens=running.position_tokens.cpu().clone(),
            **_correlated(running, num_tokens),
        )
        found._drop_stale()
        return found

    @property
    def num_features(self) -> int:
        """Number of features."""
        return len(self.bins)

    @property
    def fired(self) -> torch.Tensor:
        """Number of tokens on which each feature fires, `(features,)`."""
        return self.position_counts.sum(1)

    @property
    def density(self) -> torch.Tensor:
        """Share of the tokens on which each feature fires, `(features,)`."""
        return self.fired.double() / self.num_tokens

    @property
    def mean_activation(self) -> torch.Tensor:
        """Mean activation on these tokens, `(features,)`."""
        return self.position_sums.sum(1) / self.fired.clamp(min=1)

    @property
    def max_activation(self) -> torch.Tensor:
        """Largest activation of each feature, `(features,)`."""
        return self.groups["top"].values[:, 0]

    @property
    def correlation_error(self) -> float:
        """Standard error of `correlations`."""
        return self.sizes.sketch**-0.5 if self.sizes.sketch else float("inf")

    def histogram(self, feature: int) -> ActivationHistogram:
        """How often a feature fires how strongly."""
        return histogram_of(self.bins[feature], int(self.exponents[feature]))

    def windows(self, feature: int, group: str, as_drawn: bool = False) -> list[ExampleWindow]:
        """
        Examples of a feature.

        Args:
            feature (`int`): Number of the feature.
            group (`str`): Name of the group, as in [`ExampleSizes`], except `interval`.
            as_drawn (`bool`, *optional*, defaults to `False`): Whether random ones are in the order in which they were drawn.

        Returns:
            `list[ExampleWindow]`: strongest first; windows in which the feature is silent in the order of their choice.

        Raises:
            [`TranscoderError`]: the feature does not exist, or the group was not kept.
        """
        check_features([feature], self.num_features)
        if group not in self.groups or group == "interval":
            known = ", ".join(name for name in self.groups if name != "interval")
            raise TranscoderError(f"There are no examples of the kind '{group}': choose from {known}.")
        found = list(self._windows(self.groups[group], (feature,), silent=group in SILENT_GROUPS))
        if as_drawn or group in SILENT_GROUPS:
            return found
        return sorted(found, key=lambda window: -window.value)

    def quantiles(self, feature: int, count: int = 5, size: int = 5) -> dict[str, list[ExampleWindow]]:
        """
        Examples at random tokens on which a feature fires, in groups that stand for equal shares of these tokens.

        Args:
            feature (`int`): Number of the feature.
            count (`int`, *optional*, defaults to 5): Number of groups.
            size (`int`, *optional*, defaults to 5): Largest number of examples in each, as far apart as possible.

        Returns:
            `dict[str, list[ExampleWindow]]`: `"80-100%"`, `"60-80%"`, ... -> examples, strongest first, without those of the
            group `top`. Quantiles without examples are left out.
        """
        drawn = self.windows(feature, "random_tokens")
        top = {(window.row, window.position) for window in self.windows(feature, "top")}
        ends = [round(100 * i / count) for i in range(count, -1, -1)]
        found = {}
        for number in range(count):
            its = drawn[len(drawn) * number // count : len(drawn) * (number + 1) // count]
            its = [window for window in its if (window.row, window.position) not in top]
            most = min(size, len(its))
            if most:
                # From the middle of equal parts.
                its = [its[(2 * i + 1) * len(its) // (2 * most)] for i in range(most)]
                found[f"{ends[number + 1]}-{ends[number]}%"] = its
        return found

    def intervals(self, feature: int) -> list[Interval]:
        """The intervals of equal width up to the largest activation of a feature, highest first; none if it never fires."""
        histogram = self.histogram(feature)
        per = self.bins.shape[1] // NUM_INTERVALS
        width, found = histogram.width * per, []
        for number in range(-(-len(histogram.counts) // per)):
            windows = []
            if "interval" in self.groups:
                windows = list(self._windows(self.groups["interval"], (feature, number), silent=False))
            count = sum(histogram.counts[number * per : (number + 1) * per])
            found.append(Interval(number * width, (number + 1) * width, count, windows))
        return found[::-1]

    def correlated_features(self, feature: int) -> list[tuple[int, float]]:
        """The most correlated other features with their correlations: only those that differ from 0 by more than chance."""
        pairs = zip(self.correlated[feature].tolist(), self.correlations[feature].tolist(), strict=True)
        return [(other, value) for other, value in pairs if other >= 0]

    def by_position(self, feature: int) -> list[tuple[int, int, float, float]]:
        """For groups of positions, first and last position, the share of tokens on which a feature fires, and its mean
        activation on these."""
        found = []
        for group, tokens in enumerate(self.position_tokens.tolist()):
            if tokens:
                count, total = int(self.position_counts[feature, group]), float(self.position_sums[feature, group])
                found.append((2**group - 1, 2 ** (group + 1) - 2, count / tokens, total / max(count, 1)))
        return found

    def _windows(self, group: ExampleGroup, place: tuple[int, ...], silent: bool) -> Iterator[ExampleWindow]:
        size = self.sizes.window
        scores, values, rows, positions = (
            getattr(group, name)[place].tolist() for name in ("scores", "values", "rows", "positions")
        )
        for number, (score, value, row, position) in enumerate(zip(scores, values, rows, positions, strict=True)):
            if score <= 0:
                continue
            begin, end = int(self.text.offsets[row]), int(self.text.offsets[row + 1])
            start = position
            if not silent:
                start = int(window_start(torch.tensor(position), torch.tensor(end - begin), size))
            tokens = self.text.tokens[begin + start : min(begin + start + size, end)].tolist()
            its = self.text.documents[begin + start : begin + start + len(tokens)].tolist()
            activations = [0.0] * len(tokens)
            if not silent:
                activations = (group.windows[place][number, : len(tokens)].float() * value).tolist()
            yield ExampleWindow(
                tokens=tokens,
                activations=activations,
                peak=position - start,
                row=int(self.text.rows[row]),
                start=start,
                documents=tuple(dict.fromkeys([int(self.text.documents[begin + position]), *its])),
            )

    def _drop_stale(self) -> None:
        """Drop windows that were chosen for the token of what was then the top activation."""
        if not {"top", "same_token"} <= self.groups.keys():
            return
        top, group = self.groups["top"], self.groups["same_token"]
        token = self.text.tokens[self.text.offsets[top.rows[:, 0].long()] + top.positions[:, 0]]
        rows = group.rows.long()
        places = (self.text.offsets[rows] + group.positions)[..., None] + torch.arange(self.sizes.window)
        ends = self.text.offsets[rows + 1][..., None]
        tokens = self.text.tokens[torch.minimum(places, ends - 1)]
        has = ((tokens == token[:, None, None]) & (places < ends)).any(-1)
        group.scores *= has


@torch.no_grad()
def _correlated(running: RunningExamples, num_tokens: int) -> dict[str, torch.Tensor]:
    """The most correlated features by the products of their sketches, whose expectation is that of their activations."""
    count = len(running.features)
    most = min(_CORRELATED, count - 1)
    correlated = torch.full((count, _CORRELATED), -1, dtype=torch.int32)
    correlations = torch.zeros(count, _CORRELATED)
    if running.sizes.sketch and most > 0:
        mean = running.total / num_tokens
        deviation = (running.squares / num_tokens - mean.square()).clamp(min=0).sqrt()
        # A feature that never fires, or always with one activation, has no correlation.
        scale = torch.where(deviation > 1e-6 * mean.abs(), 1 / (deviation * num_tokens**0.5), 0).nan_to_num(0, 0, 0)
        rows = (running.sketch * scale.float()).T.contiguous()
        shift = (mean * scale * num_tokens**0.5).float()
        least = _STANDARD_ERRORS * running.sizes.sketch**-0.5
        some = max(1, _MAX_ELEMENTS // count)
        for start in range(0, count, some):
            part = slice(start, start + some)
            products = rows[part] @ rows.T - shift[part, None] * shift
            own = torch.arange(products.shape[0], device=products.device)
            products[own, own + start] = -2
            best = products.topk(most, dim=1)
            kept = (best.values > least).cpu()
            correlated[part, :most] = best.indices.cpu().int().where(kept, -1)
            correlations[part, :most] = best.values.cpu().clamp(max=1).where(kept, 0)
    return {"correlated": correlated, "correlations": correlations}
