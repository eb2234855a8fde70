"""Prompts from templates, and how rows of a task are drawn."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from string import Formatter

from ..errors import TranscoderError


@dataclass(frozen=True)
class Prompt:
    """A text and where its named words stand: name -> begin and end, in characters."""

    text: str
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One pair of prompts before it is encoded. Answers are texts that continue the clean prompt, or token ids."""

    clean: Prompt
    corrupted: Prompt | None
    answers: list[str] | list[int]
    wrong_answers: list[str] | list[int]
    candidates: list[str] | list[int] | None = None
    template: int = 0
    metadata: dict = field(default_factory=dict)
    # Token indices that are known already, such as those of a file.
    positions: dict[str, int] = field(default_factory=dict)


def fill(template: str, words: dict[str, str]) -> Prompt:
    """
    A template with its fields replaced, which remembers where each first stands.

    Args:
        template (`str`): Text with fields such as `{S1}`.
        words (`dict[str, str]`): Field -> word.
    """
    text, spans = "", {}
    for literal, name, _, _ in Formatter().parse(template):
        text += literal
        if name is not None:
            spans.setdefault(name, (len(text), len(text) + len(words[name])))
            text += words[name]
    return Prompt(text, spans)


def draw_rows(size: int, seed: int, draw: Callable[[random.Random, int], Row]) -> list[Row]:
    """
    Draws rows until there are `size` with different clean prompts.

    Args:
        size (`int`): Rows to draw.
        seed (`int`): The same seed gives the same rows.
        draw (`Callable`): Makes one row from a random generator and the row's number.

    Raises:
        [`TranscoderError`]: `size` is below one, or more than can be drawn.
    """
    if size < 1:
        raise TranscoderError(f"size is {size}, but a task has at least one row: give a positive number.")
    generator = random.Random(seed)
    rows = {}
    for _ in range(20 * size + 1000):
        row = draw(generator, len(rows))
        rows.setdefault(row.clean.text, row)
        if len(rows) == size:
            return list(rows.values())
    raise TranscoderError(
        f"Only {len(rows)} different prompts were found where {size} were asked for: give a smaller size, or leave out "
        "the split."
    )


def choose(name: str, value: str, choices) -> None:
    """Refuses a value that is none of the choices."""
    if value not in choices:
        raise TranscoderError(f"There is no {name} '{value}': choose from {', '.join(choices)}.")
