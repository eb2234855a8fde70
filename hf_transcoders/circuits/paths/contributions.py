"""Columns of what writers add to readers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from .filters import PathFilter
from .steps import KINDS


class _Columns:
    """Tensors of one length, taken and joined together."""

    def __len__(self):
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, rows):
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @classmethod
    def cat(cls, parts):
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})


@dataclass(frozen=True)
class Reads(_Columns):
    """Vectors that what was written at a token is multiplied with.

    Args:
        vector (`torch.Tensor` of shape `(rows, hidden)`): The vectors, behind all norms: for what is added to the stream.
        scale (`torch.Tensor` of shape `(rows,)`): What every product counts with.
        constant (`torch.Tensor` of shape `(rows,)`): What readers add themselves: their biases.
        layer, position (`torch.LongTensor` of shape `(rows,)`): Layer of the reader, and token.
        space (`torch.LongTensor` of shape `(rows,)`):
            0: the stream is read; 1, 2: only attention's output of the layer, behind or before a post-norm.
        floor, height (`torch.LongTensor` of shape `(rows,)`): What is read was written at heights from `floor` up to,
            but not at, `height`. Layer l writes at 4l (dictionary at `resid_pre`), 4l + 1 (attention), 4l + 2 (MLP) and
            4l + 3 (dictionary at `resid_post`), embeddings at -1.
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
    """What writers add to readers, one entry each; the fields of [`Step`] as columns.

    Args:
        row (`torch.LongTensor` of shape `(entries,)`): Which reader.
        kind (`torch.LongTensor` of shape `(entries,)`): Index into `KINDS`.
        layer, position, index (`torch.LongTensor` of shape `(entries,)`): Of the writer.
        dictionary (`torch.LongTensor` of shape `(entries,)`): Number of its dictionary, or -1.
        continues (`torch.BoolTensor` of shape `(entries,)`): Whether it reads the stream itself, so that a path can go on.
        activation, weight, contribution (`torch.Tensor` of shape `(entries,)`): The factors; the product with the scale.
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
            count (`int`): How many at most.
            among (`torch.BoolTensor` of shape `(entries,)`, *optional*): Which are looked at.
        """
        numbers = torch.arange(len(self), device=self.row.device) if among is None else among.nonzero()[:, 0]
        order = self.contribution[numbers].abs().argsort(descending=True, stable=True)
        return numbers[order[:count]]


class Collector:
    """Gathers what writers add, and forgets at once what can be neither wanted nor among the strongest.

    Args:
        reads ([`Reads`]): The readers.
        keep (`int`, *optional*): How many of the strongest are wanted. All by default.
        filters (`Sequence[PathFilter]`): Of which kinds; any one must hold.

    Attributes:
        sums (`torch.Tensor` of shape `(rows, kinds)`): All that was added, whether kept or not, in fp64.
    """

    def __init__(self, reads: Reads, keep: int | None, filters: Sequence[PathFilter]):
        self.reads = reads
        self.keep = keep
        self.filters = filters
        self.parts: list[Contributions] = []
        self.sums = torch.zeros(len(reads), len(KINDS), dtype=torch.float64, device=reads.vector.device)

    def add(self, kind, row, layer, activation, weight, position, index=-1, dictionary=-1, continues=False):
        """Entries of one kind; everything but `row` and `weight` may be one number for all of them."""
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
