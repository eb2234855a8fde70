"""Heatmaps and attention patterns as SVG."""

import math
from html import escape

from ..text.visible import visible
from .plots import is_finite
from .sections import AttentionView, Heatmap, cell_text


# Readable on light and dark pages; the opacity encodes the magnitude.
POSITIVE, NEGATIVE = "#e8590c", "#1c7ed6"
_MOST_TICKS = 32


def heatmap_svg(heatmap: Heatmap) -> str:
    """Draw a heatmap as an `<svg>` element whose cells show their number, interval and note on hover."""
    rows, columns = len(heatmap.rows), len(heatmap.columns)
    width, height = _cell_size(columns, 500), min(_cell_size(rows, 560), 20.0)
    # The legend is 190 wide for every map.
    pad = max(0.0, (190 - columns * width) / 2 - 30)
    left = 28 + 7 * max(len(name) for name in heatmap.rows) + pad
    tilted = max(len(name) for name in heatmap.columns) * 7 > width
    bottom = 14 + (6 * max(len(name) for name in heatmap.columns) if tilted else 14)
    top, legend = 6, 26
    whole = (left + columns * width + 8 + pad + (30 if pad else 0), top + rows * height + bottom + 16 + legend)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole[0]:.0f} {whole[1]:.0f}" role="img" '
        f'style="max-width:{whole[0] * 1.25:.0f}px" aria-label="{escape(heatmap.title)}" '
        'font-family="system-ui, sans-serif" font-size="11" fill="currentColor">'
    ]
    for row, name in enumerate(heatmap.rows):
        y = top + row * height
        if row % tick_step(rows) == 0:
            parts.append(f'<text x="{left - 6}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for column in range(columns):
            parts.append(_svg_cell(heatmap, row, column, left + column * width, y, width, height))
    under = top + rows * height
    for column in range(0, columns, tick_step(columns)):
        x = left + (column + 0.5) * width
        turn = f' transform="rotate(-55 {x:.1f} {under + 13:.1f})" text-anchor="end"' if tilted else ""
        anchor = "" if tilted else ' text-anchor="middle"'
        parts.append(f'<text x="{x:.1f}" y="{under + 13:.1f}"{anchor}{turn}>{escape(heatmap.columns[column])}</text>')
    middle = left + columns * width / 2
    parts.append(f'<text x="{middle:.1f}" y="{under + bottom + 12:.1f}" text-anchor="middle" fill-opacity=".7">')
    parts.append(f"{escape(heatmap.column_label)}</text>")
    across = top + rows * height / 2
    parts.append(
        f'<text x="{11 + pad:.1f}" y="{across:.1f}" text-anchor="middle" fill-opacity=".7" '
        f'transform="rotate(-90 {11 + pad:.1f} {across:.1f})">{escape(heatmap.row_label)}</text>'
    )
    parts += _svg_legend(heatmap.limit, middle, under + bottom + 22)
    parts.append("</svg>")
    return "\n".join(parts)


def attention_svg(view: AttentionView) -> str:
    """Draw an attention pattern as an `<svg>` element: rows are queries, columns are keys, and hovering shows the weight."""
    count = len(view.tokens)
    size = _cell_size(count, 440)
    names = [visible(token) for token in view.tokens]
    step = 1 if size >= 9 else math.ceil(9 / size)
    margin = 8 + 6.4 * min(max(map(len, names)), 12)
    whole = margin + count * size + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole:.0f} {whole:.0f}" role="img" '
        f'style="max-width:{whole * 1.3:.0f}px" aria-label="{escape(view.title)}" '
        f'font-family="system-ui, sans-serif" font-size="{min(10.5, max(8, size)):.1f}" fill="currentColor">'
    ]
    steps = " ".join(f"h{size:.2f} v{size:.2f}" for _ in range(count))
    parts.append(f'<path d="M{margin:.1f} 2 {steps} H{margin:.1f} Z" fill="currentColor" fill-opacity=".05"/>')
    for at in range(0, count, step):
        along, name = margin + (at + 0.5) * size, escape(names[at][:12])
        parts.append(f'<text x="{margin - 4:.1f}" y="{2 + (at + 0.8) * size:.1f}" text-anchor="end">{name}</text>')
        below = 2 + count * size + 6
        parts.append(
            f'<text x="{along:.1f}" y="{below:.1f}" text-anchor="end" '
            f'transform="rotate(-90 {along:.1f} {below:.1f}) translate(0 {size / 3:.1f})">{name}</text>'
        )
    for query, row in enumerate(view.pattern):
        for key, share in enumerate(row):
            if share >= 0.005:
                hover = escape(f"{names[query]} → {names[key]}: {share:.4f}")
                parts.append(
                    f'<rect x="{margin + key * size:.1f}" y="{2 + query * size:.1f}" width="{size:.2f}" '
                    f'height="{size:.2f}" fill="{POSITIVE}" fill-opacity="{min(share, 1.0):.3f}">'
                    f"<title>{hover}</title></rect>"
                )
    parts.append("</svg>")
    return "\n".join(parts)


def _svg_cell(heatmap, row, column, x, y, width, height):
    value = heatmap.values[row][column]
    place = f"{heatmap.row_label} {heatmap.rows[row]}, {heatmap.column_label} {heatmap.columns[column]}"
    text = f"{place}: {cell_text(value)}"
    if heatmap.low is not None and heatmap.high is not None:
        text += f" [{cell_text(heatmap.low[row][column])}, {cell_text(heatmap.high[row][column])}]"
    mark = heatmap.marks.get((row, column))
    if mark:
        text += f" · {mark}"
    if is_finite(value):
        color, opacity = (POSITIVE if value > 0 else NEGATIVE), abs(value) / heatmap.limit
    else:
        color, opacity = "currentColor", 0.12
    frame = ' stroke="currentColor" stroke-width="1.6"' if mark else ' stroke="currentColor" stroke-opacity=".1"'
    return (
        f'<rect x="{x + 0.8:.1f}" y="{y + 0.8:.1f}" width="{width - 1.6:.1f}" height="{height - 1.6:.1f}" rx="1.5" '
        f'fill="{color}" fill-opacity="{opacity:.3f}"{frame}><title>{escape(text)}</title></rect>'
    )


def _svg_legend(limit, middle, y):
    for step in range(-5, 6):
        color = POSITIVE if step > 0 else NEGATIVE
        yield (
            f'<rect x="{middle + 11 * step - 5.5:.1f}" y="{y}" width="11" height="8" fill="{color}" '
            f'fill-opacity="{abs(step) / 5:.1f}" stroke="currentColor" stroke-opacity=".12"/>'
        )
    yield f'<text x="{middle - 66:.1f}" y="{y + 8}" text-anchor="end" font-size="10">{-limit:.3g}</text>'
    yield f'<text x="{middle + 66:.1f}" y="{y + 8}" font-size="10">{limit:.3g}</text>'


def _cell_size(count, room):
    return max(5.0, min(24.0, room / max(count, 1)))


def tick_step(count):
    return max(1, math.ceil(count / _MOST_TICKS))
