"""Forced attention as rows of patches: heads that attend, from one token, only to some named tokens."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...circuits.patching.attention_edits import AttentionEdit
from ...circuits.patching.patch_plan import COMPONENTS, PatchPlan
from ...circuits.patching.results import Head
from ...errors import TranscoderError
from ...tasks.task import Task, TokenBatch


#: Name of the token at index 0, which every prompt has.
FIRST_TOKEN = "first token"


@dataclass(frozen=True)
class ForcedHead:
    """A head that attends only to a set of tokens, equally to each.

    Args:
        head (`Head`): Layer and number of the head.
        tokens (`str`): Name of the set of tokens.
    """

    head: Head
    tokens: str

    def __str__(self) -> str:
        return f"{self.head[0]}.{self.head[1]} to {self.tokens}"


def token_sets(task: Task, query: str = "END") -> dict[str, tuple[str, ...]]:
    """Name the sets of tokens that heads can be forced to attend to.

    Each named position is a set of its own, and positions that differ only in a number at the end, such as
    `wrong_colour_1` and `wrong_colour_2`, are one set with the name in front of the number, `wrong_colour`. The first token
    is a set too. Positions that come after the query token in a prompt are left out.

    Args:
        task ([`Task`]): Prompts with named positions.
        query (`str`, *optional*, defaults to `"END"`): Name of the position of the query token.

    Returns:
        `dict[str, tuple[str, ...]]`: name of each set -> names of its positions.
    """
    positions = task.tokens().positions
    at = _position(task, positions, query)
    sets = {}
    for name in task.position_names:
        if (positions[name] <= at).all():
            stem = re.sub(r"_\d+$", "", name)
            sets.setdefault(stem if stem not in positions else name, []).append(name)
    return {name: tuple(each) for name, each in sets.items()} | {FIRST_TOKEN: (FIRST_TOKEN,)}


def choose_sets(task: Task, names: Sequence[str], query: str = "END") -> dict[str, tuple[str, ...]]:
    """Choose sets of tokens by name: those of [`token_sets`], or single positions.

    Raises:
        [`TranscoderError`]: there is no such set or position.
    """
    known = token_sets(task, query)
    known = {name: (name,) for names in known.values() for name in names} | known
    for name in names:
        if name not in known:
            raise TranscoderError(
                f"The task '{task.name}' has no tokens '{name}' up to {query}: choose from {', '.join(known)}."
            )
    return {name: known[name] for name in names}


def key_tokens(task: Task, names: Sequence[str], tokens: TokenBatch | None = None) -> torch.Tensor:
    """Find the tokens of named positions in each prompt, `(prompts, names)`; `"first token"` is token 0.

    Raises:
        [`TranscoderError`]: the task has no such position.
    """
    positions = (tokens or task.tokens()).positions
    first = torch.zeros_like(positions["END"])
    return torch.stack([first if name == FIRST_TOKEN else _position(task, positions, name) for name in names], dim=1)


class ForcedAttention:
    """Makes plans and edits of forced attention on the prompts of a task.

    Args:
        task ([`Task`]): The prompts.
        sets (`Mapping[str, Sequence[str]]`): Name of each set of tokens -> names of its positions.
        query (`str`, *optional*, defaults to `"END"`): Name of the position of the query token.

    Raises:
        [`TranscoderError`]: the task has no such position, a set is empty, or one has a token after the query token.
    """

    def __init__(self, task: Task, sets: Mapping[str, Sequence[str]], query: str = "END"):
        tokens = task.tokens()
        self.query = _position(task, tokens.positions, query)
        self.keys: dict[str, torch.Tensor] = {}
        self.length = tokens.input_ids.shape[1]
        for name, positions in sets.items():
            if not positions:
                raise TranscoderError(f"The set of tokens '{name}' is empty: give at least one position.")
            keys = key_tokens(task, positions, tokens)
            late = (keys > self.query[:, None]).nonzero()
            if len(late):
                row, column = late[0].tolist()
                raise TranscoderError(
                    f"In prompt {row}, {positions[column]} (token {int(keys[row, column])}) comes after the query token "
                    f"{query} (token {int(self.query[row])}), which cannot attend to it: choose other tokens or a later query."
                )
            self.keys[name] = keys

    def add(self, name: str, keys: torch.Tensor) -> None:
        """Add a set of tokens by their indices, `(prompts, tokens)`."""
        self.keys[name] = keys

    def plan(self, rows: Sequence[Sequence[ForcedHead]]) -> PatchPlan:
        """Make a plan with one row for each combination of forced heads."""
        names = list(self.keys)
        entries = [
            (number, *forced.head, names.index(forced.tokens)) for number, row in enumerate(rows) for forced in row
        ]
        row, layer, head, chosen = torch.tensor(entries, dtype=torch.long).reshape(-1, 4).unbind(1)
        component = torch.full_like(row, COMPONENTS.index("pattern"))
        patterns = torch.stack([self._pattern(keys) for keys in self.keys.values()])
        return PatchPlan(len(rows), row, layer, component, head, self.query.expand(len(row), -1), patterns[chosen])

    def edits(self, forced: Sequence[ForcedHead], prompts: Sequence[int] | None = None) -> list[AttentionEdit]:
        """Make the same edits for whole forward passes, on some of the prompts or all of them."""
        rows = slice(None) if prompts is None else list(prompts)
        return [AttentionEdit([each.head], "force", self.keys[each.tokens][rows], self.query[rows]) for each in forced]

    def _pattern(self, keys):
        weights = torch.full(keys.shape, 1 / keys.shape[1])
        return torch.zeros(len(keys), self.length).scatter_add_(1, keys, weights)


def _position(task, positions, name):
    if name not in positions:
        raise TranscoderError(
            f"The task '{task.name}' has no position '{name}': choose from {', '.join(task.position_names)}, or "
            f"'{FIRST_TOKEN}' for tokens to attend to."
        )
    return positions[name]
