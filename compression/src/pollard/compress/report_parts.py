"""What pages are made of: the frame, tables, figures in words; no plot in particular."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

BLUE, GREEN, GREY, RED = "#3266ad", "#2f9e62", "#9aa3ad", "#c8553d"


_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #f4f6f8; margin: 0; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 8px; }
p { margin: 6px 0 12px; max-width: 78ch; } .muted { color: #5c6875; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px;
  margin: 22px 0; }
.card { background: #fff; border: 1px solid #dfe4e9; border-radius: 10px; padding: 14px 18px; }
.card .what { color: #5c6875; font-size: 13px; } .card .big { font-size: 27px; font-weight: 650; }
.card .how { font-size: 13px; color: #5c6875; }
.panel { background: #fff; border: 1px solid #dfe4e9; border-radius: 10px; padding: 12px 16px;
  overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid #edf0f3;
  white-space: nowrap; }
th { color: #5c6875; font-weight: 600; font-size: 13px; }
th:first-child, td:first-child { text-align: left; }
td.text, th.text { text-align: left; white-space: normal; }
tr.chosen td { background: #eaf6ef; font-weight: 600; }
.two { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr));
  gap: 14px; }
.two > * { min-width: 0; overflow-x: hidden; }
pre { white-space: pre-wrap; word-break: break-word; font-size: 12.5px; margin: 0; }
details { margin-top: 10px; } summary { cursor: pointer; color: #3266ad; }
.warning { background: #fdf3e3; border: 1px solid #ecd3a4; border-radius: 10px;
  padding: 10px 16px; }
ul { margin: 6px 0 12px; padding-left: 22px; overflow-wrap: anywhere; }
.panel + p { margin-top: 18px; }
@media (max-width: 600px) {
  main { padding: 20px 14px 48px; }
  .panel { padding: 8px; }
  th, td { padding: 5px 4px; font-size: 13px; white-space: normal; }
  th:first-child, td:first-child { overflow-wrap: anywhere; min-width: 84px; }
  /* They would lie over the legends, and fingers zoom without them. */
  .modebar-container { display: none; }
}
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark; }
  body { color: #dcdcdc; background: #151515; }
  .card, .panel { background: #1f1f1f; border-color: #353535; }
  .muted, th, .card .what, .card .how { color: #a5a5a5; }
  th, td { border-color: #303030; }
  tr.chosen td { background: #1c3a2a; }
  summary { color: #86b3ef; }
  .warning { background: #382e17; border-color: #6b5526; }
  /* Plots are drawn for white paper, which this turns into the panels' own colour; their hues
     stay. */
  .plotly-graph-div { filter: invert(0.88) hue-rotate(180deg); }
}
"""


def page(title: str, sections: list[str]) -> str:
    """Return a self-contained page that can hold plots."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><main>"
        + "\n".join(sections)
        + "</main></body></html>\n"
    )


def panel(inner: str) -> str:
    """Return a frame around a part of the page."""
    return f"<div class='panel' style='margin-top:12px'>{inner}</div>"


def card(what: str, big: str, how: str) -> str:
    """Return a figure with a title above and a note below."""
    return (
        f"<div class='card'><div class='what'>{what}</div><div class='big'>{big}</div>"
        f"<div class='how'>{how}</div></div>"
    )


def table(
    heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], chosen: int | None = None
) -> str:
    """Return a table; ``chosen`` is the index of a row to set off."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr{' class=chosen' if index == chosen else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def plot(figure: go.Figure, height: int) -> str:
    """Return a figure, ``height`` pixels high, for :func:`page`."""
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 40, "t": 40, "b": 50},
        template="plotly_white",
        # G and not B for 10^9, as in the tables.
        xaxis={"exponentformat": "SI"},
        yaxis={"exponentformat": figure.layout.yaxis.exponentformat or "SI"},
        font={"family": "system-ui, sans-serif", "size": 13},
        autosize=True,
    )
    drawn: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True}
    )
    return drawn


def code(value: object) -> str:
    """Return a value as text, indented."""
    return f"<pre>{html.escape(json.dumps(value, indent=2))}</pre>"


def signed(points: float) -> str:
    """Return points with their sign."""
    # Without the sign of a negative zero.
    return f"{round(points, 2) + 0.0:+.2f}"


def points(value: float) -> str:
    """Return a number of points."""
    return f"{value:g} point{'' if value == 1 else 's'}"


def faster(ratio: float) -> str:
    """Return how many times faster, or slower, something is that has ``ratio`` times the speed."""
    return f"{ratio:.2f} × faster" if ratio >= 1 else f"{1 / ratio:.2f} × slower"


def small(value: float) -> str:
    """Return a small number with two digits that say something, and without an exponent."""
    return np.format_float_positional(value, precision=2, fractional=False, trim="-")


def moment(iso: str) -> str:
    """Return a time of ISO 8601 in UTC as people write it."""
    return datetime.fromisoformat(iso).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def time_text(us: float) -> str:
    """Return a duration in a fitting unit."""
    if us < 1000:
        return f"{us:.1f} µs"
    return f"{us / 1000:.2f} ms" if us < 100_000 else f"{us / 1000:.0f} ms"


def bytes_text(count: float) -> str:
    """Return a size in a fitting unit."""
    if count < 10_000:
        return f"{count:.0f} B"
    return f"{count / 1000:.1f} kB" if count < 1_000_000 else f"{count / 1_000_000:.2f} MB"


def count_text(value: float) -> str:
    """Return a count in a fitting unit."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f}"
