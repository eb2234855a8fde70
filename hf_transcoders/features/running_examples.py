"""Collect the examples and the counts of all features of one dictionary, while text streams by."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..models.linear_parts import encoder_rows
from ..models.modeling_transcoder import TranscoderModel
from .activation_histograms import NUM_BINS, RunningHistograms
from .running_group import ActivationPart, RunningGroup
from .text_sample import TextSample


#: Number of equal-width intervals of a feature's activations, up to a power of two.
NUM_INTERVALS = 8
#: Number of groups of positions: 0, 1-2, 3-6, 7-14 and so on.
NUM_POSITION_GROUPS = 24
# Features with the most similar encoder rows, whose firing makes a window a near miss.
_NEIGHBORS = 4
# Elements of the largest temporary of comparing encoder rows.
_MAX_ELEMENTS = 2**24


@dataclass(frozen=True)
class ExampleSizes:
    """What is kept of each feature. 0 leaves a group out.

    Args:
        window (`int`, *optional*, defaults to 32): Number of tokens of an example.
        top (`int`, *optional*, defaults to 20): Examples with the largest activations, one of each row.
        random_tokens (`int`, *optional*, defaults to 25): Examples at random ones of the tokens on which the feature fires, one
            of each row: sorted, they stand for the quantiles of its activations.
        random_windows (`int`, *optional*, defaults to 20): Examples at the strongest activation of random ones of the rows in
            which the feature fires.
        interval (`int`, *optional*, defaults to 5): Examples at random tokens in each of up to 8 intervals of equal width.
        silent (`int`, *optional*, defaults to 20): Random windows in which the feature is silent.
        neighbors (`int`, *optional*, defaults to 10): Windows in which it is silent and one of the features with the four most
            similar encoder rows fires most strongly.
        same_token (`int`, *optional*, defaults to 10): Random windows in which it is silent on the token of its top activation.
        sketch (`int`, *optional*, defaults to 1024): Numbers by which the correlations of features are estimated.
    """

    window: int = 32
    top: int = 20
    random_tokens: int = 25
    random_windows: int = 20
    interval: int = 5
    silent: int = 20
    neighbors: int = 10
    same_token: int = 10
    sketch: int = 1024

    @property
    def groups(self) -> dict[str, int]:
        """Name of each group of examples -> its examples of a column."""
        names = ("top", "random_tokens", "random_windows", "interval", "silent", "neighbors", "same_token")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


#: Groups of windows in which a feature is silent.
SILENT_GROUPS = ("silent", "neighbors", "same_token")


class RunningExamples:
    """The examples and counts of some features of one dictionary so far. Memory is fixed for each feature.

    Args:
        features (`Iterable[int]`): Numbers of the features.
        dictionary ([`TranscoderModel`]): The dictionary.
        sample ([`TextSample`]): The text.
        sizes ([`ExampleSizes`]): What is kept.
    """

    def __init__(self, features: Iterable[int], dictionary: TranscoderModel, sample: TextSample, sizes: ExampleSizes):
        self.features, self.dictionary, self.sample, self.sizes = list(features), dictionary, sample, sizes
        device, count = dictionary.device, len(self.features)
        # Apple's GPUs have no float64.
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.groups: dict[str, RunningGroup] = {}
        for name, size in sizes.groups.items():
            per = NUM_INTERVALS if name == "interval" else 1
            window = 0 if name in SILENT_GROUPS else sizes.window
            self.groups[name] = RunningGroup(count * per, size, window, sample, device, per)
        self.histograms = RunningHistograms(count, device)
        self.position_counts = torch.zeros(count, NUM_POSITION_GROUPS, dtype=torch.long, device=device)
        self.position_sums = torch.zeros(count, NUM_POSITION_GROUPS, dtype=exact, device=device)
        self.squares = torch.zeros(count, dtype=exact, device=device)
        # Tokens that count, by position.
        self.position_tokens = torch.zeros(NUM_POSITION_GROUPS, dtype=torch.long, device=device)
        self.sketch = torch.zeros(sizes.sketch, count, device=device)
        self._priorities = sample.priorities.to(device)
        self._row_priorities = sample.row_priorities.to(device)
        self._lengths = torch.tensor(sample.blocks.lengths, device=device)
        near_misses = {"neighbors", "same_token"} & self.groups.keys()
        self._tokens = sample.blocks.input_ids.to(device) if near_misses else None
        self._vocabulary = int(sample.blocks.input_ids.max()) + 1 if near_misses else 0
        self._neighbors = _most_similar(dictionary, self.features) if "neighbors" in self.groups else None

    @property
    def fired(self) -> torch.Tensor:
        """Number of tokens on which each feature fired, `(features,)`."""
        return self.position_counts.sum(1)

    @property
    def total(self) -> torch.Tensor:
        """Sum of the activations of each feature, `(features,)`."""
        return self.position_sums.sum(1)

    def update(self, activations: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor) -> None:
        """Take in a few blocks.

        Args:
            activations (`torch.Tensor` of shape `(blocks, seq, features)`): Activations, 0 on tokens that do not count.
            rows (`torch.LongTensor` of shape `(blocks,)`): Number of each block.
            mask (`torch.BoolTensor` of shape `(blocks, seq)`): Tokens that count.
        """
        rows, mask = rows.to(activations.device), mask.to(activations.device)
        part = ActivationPart(activations, rows, self._lengths[rows])
        priorities = self._priorities[rows, : activations.shape[1]]
        self._count(part, priorities, mask)
        window = self.sizes.window
        blocks, seq, count = activations.shape
        chunks = -(-seq // window)
        padded = F.pad(activations, (0, 0, 0, chunks * window - seq)) if seq % window else activations
        largest, at = padded.view(blocks, chunks, window, count).max(2)
        values, chunk = largest.max(1)
        positions = (at.gather(1, chunk[:, None])[:, 0] + chunk * window).T
        own = torch.arange(blocks, device=rows.device).expand(count, blocks)
        values = values.T.contiguous()
        if "top" in self.groups:
            self.groups["top"].offer(values, values, own, positions, part)
        if "random_windows" in self.groups:
            scores = self._row_priorities[rows].where(values > 0, 0)
            self.groups["random_windows"].offer(scores, values, own, positions, part)
        if "random_tokens" in self.groups:
            # The token with the highest priority is a random one of those on which a feature is active.
            scores, positions = priorities[..., None].where(activations > 0, 0).max(1)
            values = activations.gather(1, positions[:, None])[:, 0]
            scores, values = scores.T.contiguous(), values.T.contiguous()
            self.groups["random_tokens"].offer(scores, values, own, positions.T, part)
        if any(name in self.groups for name in SILENT_GROUPS):
            self._offer_silent(part, largest, priorities)

    def _count(self, part, priorities, mask):
        """Count the activations above 0, and offer random ones to their intervals."""
        blocks, seq, count = part.activations.shape
        flat = part.activations.reshape(-1)
        places = (flat > 0).nonzero()[:, 0]
        values = flat[places]
        finite = values.isfinite()
        if not finite.all():
            places, values = places[finite], values[finite]
        tokens = torch.div(places, count, rounding_mode="floor")
        features = places - tokens * count
        grows, doublings = self.histograms.widen(features, values)
        intervals = self.groups.get("interval")
        if intervals is not None:
            for doubling in range(NUM_INTERVALS.bit_length() - 1):
                some = grows[doublings > doubling]
                if len(some):
                    intervals.halve(some)
        bins = self.histograms.count(features, values)
        group = torch.arange(1, seq + 1, device=places.device).log2().long().clamp(max=NUM_POSITION_GROUPS - 1)
        group = group.expand(blocks, seq).reshape(-1)
        self.position_tokens.index_add_(0, group, mask.reshape(-1).long())
        keys = features * NUM_POSITION_GROUPS + group[tokens]
        self.position_counts.view(-1).index_add_(0, keys, torch.ones_like(keys))
        self.position_sums.view(-1).index_add_(0, keys, values.to(self.squares.dtype))
        self.squares.index_add_(0, features, values.to(self.squares.dtype).square())
        if self.sizes.sketch:
            # Random places and signs, from the bits of the priorities.
            bits = (priorities.reshape(-1) * 2**24).long()
            signs = ((bits >> 16) & 1).float() * 2 - 1
            self.sketch.index_add_(0, bits % self.sizes.sketch, part.activations.reshape(-1, count) * signs[:, None])
        if intervals is not None:
            self._offer_intervals(intervals, part, features * NUM_INTERVALS + bins // (NUM_BINS // NUM_INTERVALS),
                                  tokens, values, priorities)  # fmt: skip

    def _offer_intervals(self, group, part, columns, tokens, values, priorities):
        """Offer, of the activations in each interval, the one whose token has the highest priority."""
        scores = priorities.reshape(-1)[tokens]
        best = torch.zeros(len(group.scores), device=scores.device).scatter_reduce(0, columns, scores, "amax")
        gains = (best > group.scores[:, -1])[columns]
        chosen = (gains & (scores == best[columns])).nonzero()[:, 0]
        column = columns[chosen]
        shape, seq = (len(group.scores), 1), part.activations.shape[1]
        offers = []
        for tensor in (scores, values, torch.div(tokens, seq, rounding_mode="floor"), tokens % seq):
            offers.append(tensor.new_zeros(shape))
            offers[-1][column, 0] = tensor[chosen]
        group.offer(*offers, part)

    def _offer_silent(self, part, largest, priorities):
        """Offer the windows in which features are silent, given the largest activations `(blocks, windows, features)`."""
        blocks, chunks, count = largest.shape
        window = self.sizes.window
        start = torch.arange(chunks, device=largest.device) * window
        # Windows without padding, or rows that are shorter than a window.
        full = (start + window <= part.lengths[:, None]) | (start == 0)
        silent = (largest <= 0) & full[..., None]
        scores = priorities[:, start.clamp(max=priorities.shape[1] - 1)][..., None]
        own = torch.arange(blocks, device=largest.device)[:, None].expand(blocks, chunks).reshape(-1).expand(count, -1)
        places = start.expand(blocks, chunks).reshape(-1).expand(count, -1)

        def offer(name, scores, values):
            scores, values = (tensor.reshape(-1, count).T.contiguous() for tensor in (scores, values))
            self.groups[name].offer(scores, values, own, places, part)

        if "silent" in self.groups:
            offer("silent", scores.where(silent, 0), torch.zeros_like(largest))
        if "neighbors" in self.groups:
            # Where it is silent, what its neighbors do; the activations of all are there if all features are collected.
            near = largest[..., self._neighbors[:, 0]]
            for column in self._neighbors.T[1:]:
                near = torch.maximum(near, largest[..., column])
            near = near.where(silent, 0)
            offer("neighbors", near, near)
        if "same_token" in self.groups and "top" in self.groups:
            rows, positions = (getattr(self.groups["top"], name)[:, 0].long() for name in ("rows", "positions"))
            tokens = self._tokens[part.numbers, : priorities.shape[1]]
            if tokens.shape[1] % window:
                tokens = F.pad(tokens, (0, chunks * window - tokens.shape[1]))
            present = torch.zeros(blocks * chunks, self._vocabulary, dtype=torch.bool, device=tokens.device)
            present.scatter_(1, tokens.view(blocks * chunks, window), True)
            has = present[:, self._tokens[rows, positions]].view(blocks, chunks, count)
            fires = self.groups["top"].values[:, 0] > 0
            offer("same_token", scores.where(silent & has & fires, 0), torch.zeros_like(largest))

    def choose(self, count: int | None) -> list[int]:
        """Indices into `features` of those that fire, from frequent to rare: all, or `count` evenly spaced ones, if possible
        of those with all their top examples."""
        fired = self.fired
        order = fired.argsort(descending=True, stable=True)
        firing = order[fired[order] > 0]
        if count is None or len(firing) <= count:
            return firing.tolist()
        full = firing[self.groups["top"].values[firing, -1] > 0]
        candidates = full if len(full) >= count else firing
        return candidates[torch.linspace(0, len(candidates) - 1, count, device=order.device).round().long()].tolist()

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors that change, by name, not copied."""
        named = {name: getattr(self, name) for name in _STATE}
        named |= {f"histograms.{name}": getattr(self.histograms, name) for name in ("counts", "exponent")}
        for name, group in self.groups.items():
            named |= {f"{name}.{part}": getattr(group, part) for part in group.STATE}
        return named


_STATE = ("position_counts", "position_sums", "squares", "position_tokens", "sketch")


@torch.no_grad()
def _most_similar(dictionary, features):
    """For each feature, the places in the list of those with the most similar encoder rows, `(features, neighbors)`."""
    chosen = torch.tensor(features, device=dictionary.device)
    rows = F.normalize(encoder_rows(dictionary, chosen)[0], dim=-1)
    count = min(_NEIGHBORS, len(features) - 1)
    if count < 1:
        return torch.zeros(len(features), 1, dtype=torch.long, device=rows.device)
    found = []
    some = max(1, _MAX_ELEMENTS // len(rows))
    for start in range(0, len(rows), some):
        part = rows[start : start + some]
        similar = part @ rows.T
        similar[torch.arange(len(part)), torch.arange(start, start + len(part))] = -2
        found.append(similar.topk(count, dim=1).indices)
    return torch.cat(found)
