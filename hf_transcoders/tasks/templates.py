"""Fill prompt templates and draw the rows of a task."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from string import Formatter

from ..errors import TranscoderError


@dataclass(frozen=True)
class Prompt:
    """A text with named spans: name -> begin and end, in characters."""

    text: str
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One pair of prompts before encoding. Answers are continuations of the clean prompt as text, or token ids."""

    clean: Prompt
    corrupted: Prompt | None
    answers: list[str] | list[int]
    wrong_answers: list[str] | list[int]
    candidates: list[str] | list[int] | None = None
    template: int = 0
    metadata: dict = field(default_factory=dict)
    # Token indices that are already known, such as those in a file.
    positions: dict[str, int] = field(default_factory=dict)


def fill(template: str, words: dict[str, str]) -> Prompt:
    """
    Fill the fields of a template, and record the span of the first occurrence of each field.

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
    Draw rows until there are `size` rows with different clean prompts.

    Args:
        size (`int`): Number of rows.
        seed (`int`): Seed for the rows.
        draw (`Callable`): Function that makes one row from a random generator and the index of the row.

    Raises:
        [`TranscoderError`]: `size` is below 1, or larger than the number of different rows.
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
        f"Only {len(rows)} different prompts were found, but size is {size}: give a smaller size, or leave out the split."
    )


def choose(name: str, value: str, choices) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        raise TranscoderError(f"There is no {name} '{value}': choose from {', '.join(choices)}.")
