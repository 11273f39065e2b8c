"""Bars with their intervals: as SVG by ourselves, as PNG by matplotlib where it is installed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from types import ModuleType

from bulkhead.comparing.model import Comparison, Figure, Metric
from bulkhead.errors import Unsupported

_LABEL, _BARS, _ROW, _VALUE = 110, 420, 26, 150
_COLOURS = {
    "host": "#8a8f98", "container": "#1769aa", "sandbox": "#2e8b57", "microvm": "#b8541a",
    "vm": "#8b2e5d",
}  # fmt: skip
_PEER = "#c3c8d0"


@dataclass(frozen=True, slots=True)
class _Scale:
    """A linear scale, or a logarithmic one where the values are of several magnitudes."""

    least: float
    most: float
    logarithmic: bool

    def place(self, value: float) -> float:
        """From 0 to 1."""
        if not self.logarithmic:
            return min(max(value / self.most, 0.0), 1.0) if self.most else 0.0
        span = math.log(self.most / self.least)
        return min(max(math.log(max(value, self.least) / self.least) / span, 0.0), 1.0)


def _scale(figures: Sequence[Figure]) -> _Scale:
    most = max(max(one.value, one.high) for one in figures)
    positive = [one.value for one in figures if one.value > 0]
    least = min(positive, default=0.0)
    if least and most / least > 30:
        return _Scale(10 ** math.floor(math.log10(least / 1.5)), most, True)
    return _Scale(0.0, most, False)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def svg(metric: Metric, figures: Sequence[Figure]) -> str:
    """A bar for each subject, its interval as a line; a title for readers without eyes."""
    scale = _scale(figures)
    height = _ROW * len(figures) + 24
    width = _LABEL + _BARS + _VALUE
    title = escape(f"{metric.title} ({metric.unit})" if metric.unit else metric.title)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{title}" font-family="system-ui, sans-serif" font-size="13">'
    ]
    for row, one in enumerate(figures):
        top = row * _ROW
        bar = scale.place(one.value) * _BARS
        low, high = scale.place(one.low) * _BARS, scale.place(one.high) * _BARS
        colour = _COLOURS.get(one.subject, _PEER)
        middle = top + _ROW / 2
        out += [
            f'<text x="{_LABEL - 8}" y="{middle + 4}" text-anchor="end">'
            f"{escape(one.subject)}</text>",
            f'<rect x="{_LABEL}" y="{top + 5}" width="{max(bar, 1):.1f}" height="{_ROW - 10}" '
            f'fill="{colour}"/>',
            f'<path d="M{_LABEL + low:.1f} {middle}H{_LABEL + high:.1f}" stroke="#111" '
            'stroke-width="1.5"/>',
            f'<text x="{_LABEL + max(bar, high) + 8:.1f}" y="{middle + 4}">'
            f"{number(one.value)} {escape(metric.unit)}</text>",
        ]
    note = "logarithmic" if scale.logarithmic else "from zero"
    better = f", {metric.better} is better" if metric.better else ""
    out.append(
        f'<text x="{_LABEL}" y="{height - 6}" fill="#555" font-size="11">{note}{better}</text>'
        "</svg>"
    )
    return "\n".join(out)


def png(comparison: Comparison, path: str) -> None:
    """All metrics as one picture. Unsupported without matplotlib."""
    figure_module = _matplotlib()
    shown = [
        (metric, [one for one in comparison.figures if one.metric == metric.key])
        for metric in comparison.metrics
    ]
    shown = [(metric, figures) for metric, figures in shown if figures]
    columns = 3
    rows = math.ceil(len(shown) / columns)
    tall = max(len(figures) for _, figures in shown) * 0.28 + 1
    picture = figure_module.Figure(figsize=(columns * 5.5, rows * tall), layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False)
    for place, axis in enumerate(axes.flat):
        if place >= len(shown):
            axis.set_axis_off()
            continue
        metric, figures = shown[place]
        values = [one.value for one in figures]
        errors = [
            [max(one.value - one.low, 0) for one in figures],
            [max(one.high - one.value, 0) for one in figures],
        ]
        names = [one.subject for one in figures]
        colours = [_COLOURS.get(name, _PEER) for name in names]
        axis.barh(names, values, xerr=errors, color=colours, capsize=2)
        if _scale(figures).logarithmic:
            axis.set_xscale("log")
        axis.invert_yaxis()
        axis.set_title(f"{metric.title} ({metric.unit})" if metric.unit else metric.title)
    picture.savefig(path, format="png", dpi=110)


def _matplotlib() -> ModuleType:
    try:
        import matplotlib.figure
    except ImportError:
        raise Unsupported(
            "a PNG needs matplotlib: pip install 'bulkhead[plots]'; the HTML report needs nothing"
        ) from None
    return matplotlib.figure
