"""Contributions of writers to readers, as columns."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from .filters import PathFilter
from .steps import KINDS


class _Columns:
    """Tensors of one length that are indexed and concatenated together."""

    def __len__(self):
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, rows):
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @classmethod
    def cat(cls, parts):
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})


@dataclass(frozen=True)
class Reads(_Columns):
    """Vectors by which readers multiply the writes to a token.

    Args:
        vector (`torch.Tensor` of shape `(rows, hidden)`): The vectors, which apply to writes to the stream before any norm.
        scale (`torch.Tensor` of shape `(rows,)`): Factors of all products.
        constant (`torch.Tensor` of shape `(rows,)`): Biases of the readers.
        layer, position (`torch.LongTensor` of shape `(rows,)`): Layer and position of the reader.
        space (`torch.LongTensor` of shape `(rows,)`):
            0 reads the stream; 1 and 2 read the output of attention in the layer only, after or before a post-norm.
        floor, height (`torch.LongTensor` of shape `(rows,)`):
            Range of heights of the writes that are read, without `height`. Layer l writes at 4l (dictionary at
            `resid_pre`), 4l + 1 (attention), 4l + 2 (MLP) and 4l + 3 (dictionary at `resid_post`); embeddings at -1.
    """

    vector: torch.Tensor
    scale: torch.Tensor
    constant: torch.Tensor
    layer: torch.Tensor
    position: torch.Tensor
    space: torch.Tensor
    floor: torch.Tensor
    height: torch.Tensor


@dataclass(frozen=True)
class Contributions(_Columns):
    """Contributions of writers to readers, one entry each, with the fields of [`Step`] as columns.

    Args:
        row (`torch.LongTensor` of shape `(entries,)`): Number of the reader.
        kind (`torch.LongTensor` of shape `(entries,)`): Index into `KINDS`.
        layer, position, index (`torch.LongTensor` of shape `(entries,)`): Layer, position and index of the writer.
        dictionary (`torch.LongTensor` of shape `(entries,)`): Number of the writer's dictionary, or -1.
        continues (`torch.BoolTensor` of shape `(entries,)`): Whether the writer reads the stream, so that a path can continue.
        activation, weight, contribution (`torch.Tensor` of shape `(entries,)`): The factors, and their product with the scale.
    """

    row: torch.Tensor
    kind: torch.Tensor
    layer: torch.Tensor
    position: torch.Tensor
    index: torch.Tensor
    dictionary: torch.Tensor
    continues: torch.Tensor
    activation: torch.Tensor
    weight: torch.Tensor
    contribution: torch.Tensor

    def strongest(self, count: int, among: torch.Tensor | None = None) -> torch.Tensor:
        """Numbers of the entries of greatest magnitude, strongest first.

        Args:
            count (`int`): Largest number of entries.
            among (`torch.BoolTensor` of shape `(entries,)`, *optional*): Entries to choose from. All by default.
        """
        numbers = torch.arange(len(self), device=self.row.device) if among is None else among.nonzero()[:, 0]
        order = self.contribution[numbers].abs().argsort(descending=True, stable=True)
        return numbers[order[:count]]


class Collector:
    """Collects contributions of writers, and drops at once those that are filtered out or too weak.

    Args:
        reads ([`Reads`]): The readers.
        keep (`int`, *optional*): Number of the strongest contributions to keep. All by default.
        filters (`Sequence[PathFilter]`): Conditions on writers, of which one must hold.

    Attributes:
        sums (`torch.Tensor` of shape `(rows, kinds)`): Sums of all contributions, kept or not, in fp64.
    """

    def __init__(self, reads: Reads, keep: int | None, filters: Sequence[PathFilter]):
        self.reads = reads
        self.keep = keep
        self.filters = filters
        self.parts: list[Contributions] = []
        self.sums = torch.zeros(len(reads), len(KINDS), dtype=torch.float64, device=reads.vector.device)

    def add(self, kind, row, layer, activation, weight, position, index=-1, dictionary=-1, continues=False):
        """Add entries of one kind. All arguments but `row` and `weight` may be one number for all entries."""
        code = KINDS.index(kind)
        full = [
            value.to(row.device) if isinstance(value, torch.Tensor) else row.new_full(row.shape, value)
            for value in (code, layer, position, index, dictionary)
        ]
        if not isinstance(activation, torch.Tensor):
            activation = torch.full_like(weight, activation)
        contribution = self.reads.scale[row] * activation * weight
        self.sums[:, code].index_add_(0, row, contribution.double())
        wanted = contribution != 0
        if self.filters:
            wanted &= torch.stack([one.mask(*full[:4]) for one in self.filters]).any(0)
        chosen = wanted.nonzero()[:, 0]
        if self.keep is not None and len(chosen) > self.keep:
            chosen = chosen[contribution[chosen].abs().topk(self.keep).indices]
        goes_on = torch.full_like(row, continues, dtype=torch.bool)
        columns = (row, *full, goes_on, activation, weight, contribution)
        self.parts.append(Contributions(*(column[chosen] for column in columns)))
