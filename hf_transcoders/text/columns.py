"""Plain-text tables with aligned columns."""

from collections.abc import Sequence

from .printable import printable


def aligned(head: Sequence[object], rows: Sequence[Sequence[object]], left: int = 1, rule: bool = True) -> str:
    """Align rows of cells as columns of plain text.

    Args:
        head (`Sequence[object]`): Headings.
        rows (`Sequence[Sequence[object]]`):
            Cells. Control characters, including line breaks, are escaped, so that each row is one line.
        left (`int`, *optional*, defaults to 1): Number of leading columns to align to the left.
        rule (`bool`, *optional*, defaults to `True`): Whether to separate headings and rows by a line of dashes.

    Returns:
        `str`: Lines without trailing blanks.
    """
    cells = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if rule:
        cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def paired(facts: dict, indent: str = "") -> str:
    """Format names and values as lines with aligned values."""
    names = [printable(name) for name in facts]
    width = max(map(len, names), default=0)
    return "\n".join(
        f"{indent}{name.ljust(width)}  {printable(value)}" for name, value in zip(names, facts.values(), strict=True)
    )
