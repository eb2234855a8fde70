"""Text from anywhere as Markdown that shows exactly this text."""

import re
from collections.abc import Sequence


# What Markdown could take for markup, inside a line; "&", "<" and ">" become entities, which also holds in HTML blocks.
_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~!$])")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
# Line breaks of every kind, other control characters, and the marks that turn the direction of writing.
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


class Markdown(str):
    """Text that is Markdown already."""


def one_line(text: object) -> str:
    """Without line breaks, control characters and runs of spaces."""
    return _UNPRINTABLE.sub(" ", str(text)).strip()


def escape(text: object) -> str:
    """
    Markdown for a text from outside: a file's name, a dataset's, a token.

    Args:
        text (`object`): What to show; [`Markdown`] stays as it is.

    Returns:
        `str`: one line that no renderer takes for markup, also inside a table.
    """
    if isinstance(text, Markdown):
        return text
    return _SPECIAL.sub(r"\\\1", one_line(text).translate(_ENTITIES))


def code(text: object) -> Markdown:
    """A text as inline code, also inside a table."""
    text = one_line(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    # A table's cells are cut before code is looked for.
    return Markdown(f"{fence}{space}{text}{space}{fence}".replace("|", "\\|"))


def table(head: Sequence[object], rows: Sequence[Sequence[object]], numbers: bool = True) -> Markdown:
    """
    A table. What is no [`Markdown`] is escaped.

    Args:
        head (`Sequence`): Column headings.
        rows (`Sequence[Sequence]`): Cells.
        numbers (`bool`, *optional*, defaults to `True`):
            Whether all columns but the first hold numbers, which stand to the right.
    """
    lines = [head, ["---", *["---:" if numbers else "---"] * (len(head) - 1)], *rows]
    return Markdown("\n".join("| " + " | ".join(escape(cell) for cell in row) + " |" for row in lines))
