"""Texts and places of the labels of points in a chart."""

from collections.abc import Sequence


_LABEL_LENGTH = 30


def short_labels(names: Sequence[tuple[str, str]]) -> list[str]:
    """
    Shorten names `(run, dictionary)` to what distinguishes them: the run, if there are several, and the words of the
    dictionary's name that not all names share.
    """
    words = [name.split(".") for _, name in names]
    shared = set.intersection(*(set(some) for some in words)) if words else set()
    several = len({run for run, _ in names}) > 1
    labels = []
    for (run, name), some in zip(names, words, strict=True):
        own = " ".join(word for word in some if word not in shared)
        label = " ".join(part for part in (run if several else "", own) if part) or name
        labels.append(label if len(label) <= _LABEL_LENGTH else label[: _LABEL_LENGTH - 1] + "…")
    return labels


def place_labels(
    points: Sequence[tuple[float, float, str]],
    bounds: tuple[float, float, float, float],
    size: float,
    lines: Sequence[Sequence[tuple[float, float]]] = (),
) -> list[tuple[float, float] | None]:
    """
    Place labels next to their points without covering other labels, points or lines. The first points have priority.

    Args:
        points (`Sequence[tuple[float, float, str]]`): x and y (downwards) in pixels, and text.
        bounds (`tuple[float, float, float, float]`): Left, top, right and bottom of the chart.
        size (`float`): Font size.
        lines (`Sequence[Sequence[tuple[float, float]]]`, *optional*):
            Lines to avoid; two opposite corners stand for a rectangle.

    Returns:
        `list`: Left end and baseline of the label of each point; `None` if there is no room.
    """
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    for line in lines:
        for (x1, y1), (x2, y2) in zip(line, line[1:], strict=False):
            taken.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    placed: list[tuple[float, float] | None] = []
    for x, y, text in points:
        width = 0.56 * size * len(text)
        lefts_and_baselines = (
            (x - width - 9, y + size + 2), (x - width - 9, y - 5), (x + 9, y - 5), (x + 9, y + size + 2),
            (x - width - 10, y + size / 3), (x + 10, y + size / 3),
            (x - width / 2, y - 11), (x - width / 2, y + size + 9),
        )  # fmt: skip
        for left, baseline in lefts_and_baselines:
            box = (left - 1, baseline - size, left + width + 1, baseline + 2)
            inside = box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                placed.append((left, baseline))
                break
        else:
            placed.append(None)
    return placed


def _overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
