"""Filters of steps and paths by kind, layer, position, feature or head."""

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ...errors import TranscoderError
from .steps import KINDS, Path, Step


_OPERATORS = {
    "=": operator.eq, "==": operator.eq, "!=": operator.ne,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_CONDITION = re.compile(r"\s*(==?|!=|<=?|>=?)\s*(-?\d+)\s*")


@dataclass(frozen=True)
class PathFilter:
    """A condition on one step. Arguments that are left out hold for every step.

    Args:
        kind (`str` or `tuple[str, ...]`, *optional*):
            Kind of the step: one or several of `KINDS`.
        layer, position, index (`int` or `str`, *optional*):
            Layer (-1 for embeddings), position of the writer (counted from the start), and number of the feature or head: a
            number, or a condition such as `"<8"`, `">=3"`, `"!=0"`.

    Raises:
        [`TranscoderError`]: there is no such kind, or a condition cannot be read.

    Example:

    ```python
    >>> PathFilter(kind="head", layer="<8")
    >>> PathFilter(kind="feature", layer=3, index=1203)
    ```
    """

    kind: str | tuple[str, ...] | None = None
    layer: int | str | None = None
    position: int | str | None = None
    index: int | str | None = None

    def __post_init__(self):
        for kind in self._kinds():
            if kind not in KINDS:
                raise TranscoderError(f"There is no kind of step '{kind}': choose from {', '.join(KINDS)}.")
        for name in ("layer", "position", "index"):
            self._condition(name)

    def matches(self, step: Step) -> bool:
        """Whether a step meets the condition."""
        if self.kind is not None and step.kind not in self._kinds():
            return False
        conditions = ((self._condition(name), getattr(step, name)) for name in ("layer", "position", "index"))
        return all(found is None or found[0](value, found[1]) for found, value in conditions)

    def mask(
        self, kind: torch.Tensor, layer: torch.Tensor, position: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """Whether each of many steps, given as columns of one shape, meets the condition; `kind` indexes `KINDS`."""
        holds = torch.ones_like(kind, dtype=torch.bool)
        if self.kind is not None:
            wanted = torch.tensor([KINDS.index(name) for name in self._kinds()], device=kind.device)
            holds &= torch.isin(kind, wanted)
        for name, column in (("layer", layer), ("position", position), ("index", index)):
            condition = self._condition(name)
            if condition is not None:
                compare, number = condition
                holds &= compare(column, number)
        return holds

    def _kinds(self):
        if self.kind is None:
            return ()
        return (self.kind,) if isinstance(self.kind, str) else tuple(self.kind)

    def _condition(self, name):
        value = getattr(self, name)
        if value is None or isinstance(value, int):
            return None if value is None else (operator.eq, value)
        found = _CONDITION.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise TranscoderError(
                f"`{name}` is {value!r}; give a number, or a condition such as '<8', '>=3' or '!=0'."
            )
        return _OPERATORS[found[1]], int(found[2])


Filters = PathFilter | Sequence[PathFilter]


def select_paths(
    paths: Iterable[Path],
    contains: Filters | None = None,
    ends_with: Filters | None = None,
    without: Filters | None = None,
) -> list[Path]:
    """Select paths by conditions on their steps.

    Each condition is a filter, or a sequence of filters for consecutive steps, from the target down.

    Args:
        paths (`Iterable[Path]`): The paths.
        contains ([`PathFilter`] or a sequence, *optional*): Steps that a path must contain.
        ends_with ([`PathFilter`] or a sequence, *optional*): Last steps that a path must have.
        without ([`PathFilter`] or a sequence, *optional*): Steps that a path must not contain.

    Returns:
        `list[Path]`: the selected paths in their order.
    """
    contains, ends_with, without = map(filter_list, (contains, ends_with, without))
    return [
        path
        for path in paths
        if (not contains or _starts(path, contains))
        and (not ends_with or len(path) - len(ends_with) in _starts(path, ends_with))
        and (not without or not _starts(path, without))
    ]


def filter_list(filters: Filters | None) -> list[PathFilter]:
    """A list of one filter, several or none."""
    filters = [] if filters is None else [filters] if isinstance(filters, PathFilter) else list(filters)
    for one in filters:
        if not isinstance(one, PathFilter):
            raise TranscoderError(f"{one!r} is not a filter: give a `PathFilter`, or several in a list.")
    return filters


def _starts(path, filters):
    """Indices at which consecutive steps of a path meet the conditions."""
    return [
        start
        for start in range(len(path) - len(filters) + 1)
        if all(one.matches(step) for one, step in zip(filters, path.steps[start:], strict=False))
    ]
