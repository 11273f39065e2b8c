"""The report as one HTML file that loads nothing."""

from html import escape

from bulkhead.comparing import plots
from bulkhead.comparing.metrics import GROUPS
from bulkhead.comparing.model import Comparison, Figure, Metric
from bulkhead.comparing.quoted import verdicts

_TITLES = {
    "start": "Starting, stopping, one process more", "command": "Your command",
    "memory": "Memory and density", "image": "Image", "calls": "System calls",
    "work": "Processor, memory, disk", "network": "Network", "noise": "Neighbours",
    "surface": "Reachable kernel of the host",
}  # fmt: skip

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1e21; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
h3 { margin: 1.6rem 0 .2rem; } p.why { margin: 0 0 .4rem; color: #444; font-size: .93rem; }
table { border-collapse: collapse; font-size: .92rem; } caption { text-align: left; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e3e5e8;
  vertical-align: top; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; display: block; } details { margin: .3rem 0 1rem; }
.wide { overflow-x: auto; } .no { color: #9a3412; } .yes { color: #166534; }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #e4e6ea; }
  p.why { color: #b4b8bf; } svg { background: #f6f7f9; border-radius: 4px; } }
"""

_INTRODUCTION = """
<p>Each figure is a median. The thin line on a bar, and the interval in the tables, is where the
median of another run on this host is expected (order statistics at 95&nbsp;%, widened by √2; for
slopes, resampled points). Subjects took turns in a rotating order, after a warm-up that is not
counted, so that what drifts on the host meets all of them. Nothing was assumed: what could not be
measured is listed at the end, with the reason.</p>
"""


def _table(header: list[tuple[str, bool]], rows: list[list[str]]) -> str:
    head = "".join(
        f"<th{' class=n' if numeric else ''}>{escape(name)}</th>" for name, numeric in header
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=n' if numeric else ''}>{cell}</td>"
            for cell, (_, numeric) in zip(row, header, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{inner}</table></div>'


def _metric(metric: Metric, figures: list[Figure]) -> str:
    rows = [
        [
            escape(one.subject), plots.number(one.value),
            f"{plots.number(one.low)} – {plots.number(one.high)}", str(len(one.samples) or "slope"),
            escape(one.note),
        ]
        for one in figures
    ]  # fmt: skip
    header = [("", False), (metric.unit or "value", True), ("interval", True), ("samples", True),
              ("note", False)]  # fmt: skip
    return (
        f"<h3>{escape(metric.title)}</h3><p class=why>{escape(metric.explains)}</p>"
        f"{plots.svg(metric, figures)}"
        f"<details><summary>figures</summary>{_table(header, rows)}</details>"
    )


def _groups(comparison: Comparison) -> list[str]:
    out = []
    for group in GROUPS:
        parts = []
        for metric in comparison.metrics:
            figures = [one for one in comparison.figures if one.metric == metric.key]
            if metric.group == group and figures:
                parts.append(_metric(metric, figures))
        if parts:
            out += [f"<h2>{escape(_TITLES[group])}</h2>", *parts]
    return out


def _quoted(comparison: Comparison) -> str:
    rows = []
    for one in verdicts(comparison):
        mark = {"borne out": "yes", "not borne out": "no"}.get(one.verdict, "")
        verdict = f'<span class="{mark}">{escape(one.verdict)}</span>'
        rows.append([escape(one.claim), escape(one.source), escape(one.here), verdict])
    header = [("quoted", False), ("by", False), ("here", False), ("", False)]
    return _table(header, rows)


def html(comparison: Comparison) -> str:
    """The whole page."""
    host = _table(
        [("", False), ("", False)],
        [[escape(key), escape(value)] for key, value in comparison.host.items()],
    )
    subjects = _table(
        [("subject", False), ("what it is", False)],
        [[escape(name), escape(kind)] for name, kind in comparison.subjects.items()],
    )
    image = comparison.image or "an image that holds just the measuring program"
    if comparison.command:
        image += f", command {' '.join(comparison.command)}"
    titles = {metric.key: metric.title for metric in comparison.metrics}
    gaps = _table(
        [("subject", False), ("metric", False), ("why it is missing", False)],
        [
            [escape(one.subject), escape(titles.get(one.metric, "all")), escape(one.reason)]
            for one in comparison.gaps
        ],
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>What isolation costs here</title><style>{_STYLE}</style>",
        "<h1>What isolation costs on this host</h1>",
        f"<p>Measured {escape(comparison.created)}, in {comparison.seconds / 60:.1f} minutes, with "
        f"{escape(image)}.</p>",
        _INTRODUCTION, host, subjects, *_groups(comparison),
        "<h2>Figures that are commonly quoted</h2>", _quoted(comparison),
        "<h2>What is missing, and why</h2>", gaps if comparison.gaps else "<p>Nothing.</p>",
        "</html>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"
