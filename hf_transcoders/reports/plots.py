"""Small charts as SVG text, without dependencies and scripts, readable on light and dark pages."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from ..evaluation.evaluation_report import EvaluationReport


# Contrast of at least 3:1 against white and near-black. Further curves repeat the colors with dashes.
COLORS = ("#3b82f6", "#e8690b", "#2f9e54", "#b04fd0", "#0e93a8", "#e0435c", "#9a7b16", "#7a7f8c")
DASHES = ("", "6 3", "2 3")

L0_LABEL = "L0: active features per token"

_WIDTH, _HEIGHT = 400, 262
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 34, 44
_LEGEND_ROW = 19


def loss_curves(
    history: Sequence[Mapping[str, float]], metric: str, title: str, y_label: str, names: Sequence[str] | None = None
) -> str | None:
    """Draw a metric of each dictionary over training.

    Args:
        history (`Sequence[Mapping[str, float]]`):
            `trainer.state.log_history`: entries with keys such as `tokens` and `<dictionary>/fvu`.
        metric (`str`):
            Name of the metric, which follows the name of the dictionary in a key.
        title, y_label (`str`):
            Title and label of the chart.
        names (`Sequence[str]`, *optional*):
            Order of the dictionaries, which determines their colors.

    Returns:
        `str`: An `<svg>` element, or `None` if there are fewer than two points or all values are equal.
    """
    x_key = "tokens" if any("tokens" in entry for entry in history) else "step"
    curves = {name: [] for name in names or ()}
    for entry in history:
        for key, value in entry.items():
            name, slash, its_metric = key.rpartition("/")
            if slash and its_metric == metric and x_key in entry and is_finite(value):
                curves.setdefault(name, []).append((entry[x_key], value))
    return curves_over(curves, title, "tokens seen" if x_key == "tokens" else "optimizer steps", y_label)


def curves_over(
    curves: Mapping[str, Sequence[tuple[float, float]]], title: str, x_label: str, y_label: str
) -> str | None:
    """Draw curves as an `<svg>` element, or return `None` if there are fewer than two points or all values are equal."""
    values = {y for points in curves.values() for _, y in points}
    if max(map(len, curves.values()), default=0) < 2 or len(values) == 1:
        return None
    chart = Chart(title, x_label, y_label, list(curves))
    chart.add_lines(curves)
    return chart.svg()


def sparsity_fidelity(report: EvaluationReport, metric: str, title: str, y_label: str) -> str | None:
    """Draw a fidelity metric of dictionaries over L0.

    Args:
        report ([`EvaluationReport`]):
            Evaluation to draw.
        metric (`str`):
            Metric to draw: `"fvu"` or `"ce_recovered_zero"`.
        title, y_label (`str`):
            Title and label of the chart.

    Returns:
        `str`: An `<svg>` element, or `None` if no dictionary has both metrics.
    """
    points = {
        name: (entry["metrics"]["l0"], entry["metrics"][metric])
        for name, entry in report.dictionaries.items()
        if is_finite(entry["metrics"].get("l0")) and is_finite(entry["metrics"].get(metric))
    }
    if not points:
        return None
    chart = Chart(title, L0_LABEL, y_label, list(report.dictionaries))
    chart.scale([x for x, _ in points.values()], [0.0, 1.0, *(y for _, y in points.values())])
    for name, (x, y) in points.items():
        chart.add(
            f'<circle cx="{chart.x(x):.1f}" cy="{chart.y(y):.1f}" r="6" fill="{chart.color(name)}" '
            f'fill-opacity="0.85" stroke="currentColor" stroke-opacity="0.5">'
            f"<title>{escape(name)}: {x:.4g}, {y:.4g}</title></circle>"
        )
    return chart.svg()


def density_histogram(report: EvaluationReport) -> str | None:
    """Draw a histogram of firing rates for each dictionary, with log10 of the share of tokens as the x axis.

    Returns:
        `str`: An `<svg>` element, or `None` without dictionaries.
    """
    histograms = {name: entry["density_histogram"] for name, entry in report.dictionaries.items()}
    if not histograms:
        return None
    chart = Chart(
        "How often features are active", "share of tokens a feature is active on", "features", list(histograms)
    )
    edges = next(iter(histograms.values()))["log10_edges"]
    chart.scale(edges, [0, *(count for h in histograms.values() for count in h["counts"])], log10_x=True)
    for name, histogram in histograms.items():
        steps = [(edges[0], 0)]
        for start, end, count in zip(edges[:-1], edges[1:], histogram["counts"], strict=True):
            steps += [(start, count), (end, count)]
        path = " ".join(f"{chart.x(x):.1f},{chart.y(y):.1f}" for x, y in [*steps, (edges[-1], 0)])
        chart.add(
            f'<polygon points="{path}" fill="{chart.color(name)}" fill-opacity="0.16" stroke-width="1.6" '
            f"{chart.stroke(name)}><title>{escape(name)}: {histogram['never_fired']} features never fired</title>"
            "</polygon>"
        )
    return chart.svg()


def short_number(value: float) -> str:
    """Format a number for an axis, such as `12`, `3.5k` or `1.2M`."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


class Chart:
    """Axes, grid and legend of a chart, to which shapes are added."""

    def __init__(
        self, title: str, x_label: str, y_label: str, names: list[str], width: int = _WIDTH, height: int = _HEIGHT
    ):
        self.title, self.x_label, self.y_label, self.names = title, x_label, y_label, names
        self.width, self.height = width, height
        self.shapes: list[str] = []
        self.x_text = self.y_text = short_number

    def scale(self, xs, ys, log10_x=False):
        if log10_x:
            self.x_text = _power
            self.x_ticks = [float(i) for i in range(math.ceil(min(xs)), math.floor(max(xs)) + 1)]
        else:
            self.x_ticks = _ticks(xs)
        self.y_ticks = _ticks([0.0, *ys] if min(ys) > 0 and min(ys) < max(ys) / 2 else ys)
        self.x_range = (min(xs), max(xs)) if log10_x else (self.x_ticks[0], self.x_ticks[-1])
        self.y_range = (self.y_ticks[0], self.y_ticks[-1])

    def window(self, x_range, y_range, powers_of_two=False):
        """Set the shown ranges; with `powers_of_two`, x values are logarithms to base 2."""
        self.x_range, self.y_range = x_range, y_range
        if powers_of_two:
            self.x_text = lambda exponent: short_number(2.0**exponent)
            self.x_ticks = even_steps(math.ceil(x_range[0]), math.floor(x_range[1]))
        else:
            self.x_ticks = [tick for tick in _ticks(x_range) if x_range[0] <= tick <= x_range[1]]
        self.y_text = "{:.4g}".format
        self.y_ticks = [tick for tick in _ticks(y_range) if y_range[0] <= tick <= y_range[1]]

    def inside(self):
        """Left, top, right and bottom of the data area."""
        return _LEFT, _TOP - 8, self.width - _RIGHT, self.height - _BOTTOM

    def add_lines(self, lines, thin=()):
        """Scale the chart to lines of points by name, and draw them; their names show on hover."""
        xs, ys = zip(*(point for line in lines.values() for point in line), strict=True)
        self.scale(xs, ys)
        # The x axis ends at the last point.
        self.x_ticks = [tick for tick in self.x_ticks if tick <= max(xs)]
        self.x_range = (self.x_range[0], max(xs))
        for name, line in lines.items():
            path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in line)
            self.add(
                f'<polyline points="{path}" fill="none" stroke-width="{1.2 if name in thin else 1.8}" {self.stroke(name)}>'
                f"<title>{escape(name)}</title></polyline>"
            )

    def x(self, value):
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (self.width - _LEFT - _RIGHT)

    def y(self, value):
        low, high = self.y_range
        return self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _TOP - _BOTTOM)

    def color(self, name):
        return COLORS[self.names.index(name) % len(COLORS)]

    def stroke(self, name):
        dash = DASHES[self.names.index(name) // len(COLORS) % len(DASHES)]
        return f'stroke="{self.color(name)}"' + (f' stroke-dasharray="{dash}"' if dash else "")

    def add(self, shape):
        self.shapes.append(shape)

    def svg(self):
        legend = self._legend() if len(self.names) > 1 else []
        rows = math.ceil(len(self.names) / self._legend_columns()) if legend else 0
        height = self.height + rows * _LEGEND_ROW + (6 if rows else 0)
        label = escape(f"{self.title}: {self.y_label} over {self.x_label}")
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {height}" role="img" '
                f'aria-label="{label}" font-family="system-ui, sans-serif" font-size="12" fill="currentColor">',
                f'<text x="14" y="18" font-size="13.5" font-weight="600">{escape(self.title)}</text>',
                *self._axes(),
                *self.shapes,
                *legend,
                "</svg>",
            ]
        )

    def _axes(self):
        left, right, bottom = _LEFT, self.width - _RIGHT, self.height - _BOTTOM
        middle = (_TOP + bottom) / 2
        for tick in self.y_ticks:
            y = self.y(tick)
            yield (
                f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" stroke-opacity="0.15"/>'
            )
            yield f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{self.y_text(tick)}</text>'
        for tick in self.x_ticks:
            x = self.x(tick)
            yield (
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" '
                f'stroke="currentColor" stroke-opacity="0.6"/><text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{self.x_text(tick)}</text>'
            )
        yield f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="currentColor" stroke-opacity="0.6"/>'
        yield f'<text x="{(left + right) / 2}" y="{self.height - 8}" text-anchor="middle">{escape(self.x_label)}</text>'
        yield (
            f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
            f"{escape(self.y_label)}</text>"
        )

    def _legend_columns(self):
        return 2 if max(map(len, self.names)) <= 24 else 1

    def _legend(self):
        columns = self._legend_columns()
        for i, name in enumerate(self.names):
            x = 14 + (i % columns) * (self.width - 14) / columns
            y = self.height + 12 + (i // columns) * _LEGEND_ROW
            yield (
                f'<line x1="{x:.0f}" x2="{x + 20:.0f}" y1="{y - 4}" y2="{y - 4}" stroke-width="4" {self.stroke(name)}/>'
                f'<text x="{x + 27:.0f}" y="{y}">{escape(name)}</text>'
            )


def _ticks(values, count=5):
    """Return round numbers that enclose the values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = (low * 0.5, high * 1.5) if low > 0 else (low - 1, high + 1)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def even_steps(first: int, last: int, most: int = 8) -> list[int]:
    """Return at most `most` whole numbers from `first` to `last`."""
    return list(range(first, last + 1, max(1, math.ceil((last - first + 1) / most))))


def _power(exponent):
    superscript = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if exponent == 0 else f"10{superscript}"


def is_finite(value: object) -> bool:
    """Whether a value is a number, neither NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)
