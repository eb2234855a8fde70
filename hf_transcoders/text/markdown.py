"""Escape untrusted text for Markdown."""

import re
from collections.abc import Sequence


# Characters of inline markup. "&", "<" and ">" become entities, which also works in HTML blocks.
_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~!$])")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
# Line breaks, other control characters, and marks that change the writing direction.
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


class Markdown(str):
    """Text that is already Markdown and is not escaped again."""


def one_line(text: object) -> str:
    """Replace line breaks, control characters and runs of spaces by single spaces."""
    return _UNPRINTABLE.sub(" ", str(text)).strip()


def escape(text: object) -> str:
    """
    Escape a text, such as the name of a file or a token, for Markdown.

    Args:
        text (`object`): Text to show; [`Markdown`] is returned as it is.

    Returns:
        `str`: One line without markup, which can also stand in a table.
    """
    if isinstance(text, Markdown):
        return text
    return _SPECIAL.sub(r"\\\1", one_line(text).translate(_ENTITIES))


def code(text: object) -> Markdown:
    """Format a text as inline code, which can also stand in a table."""
    text = one_line(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    # Renderers split table cells before they parse inline code.
    return Markdown(f"{fence}{space}{text}{space}{fence}".replace("|", "\\|"))


def table(head: Sequence[object], rows: Sequence[Sequence[object]], numbers: bool = True) -> Markdown:
    """
    Format a table, escaping all cells that are not [`Markdown`].

    Args:
        head (`Sequence`): Column headings.
        rows (`Sequence[Sequence]`): Cells.
        numbers (`bool`, *optional*, defaults to `True`):
            Whether all columns but the first hold numbers, which are aligned to the right.
    """
    lines = [head, ["---", *["---:" if numbers else "---"] * (len(head) - 1)], *rows]
    return Markdown("\n".join("| " + " | ".join(escape(cell) for cell in row) + " |" for row in lines))
