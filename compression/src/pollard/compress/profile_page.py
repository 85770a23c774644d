"""A profile as a table on the terminal and as one self-contained page."""

from __future__ import annotations

import html
from typing import Any

import plotly.graph_objects as go
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from pollard.compress.report_parts import (
    BLUE,
    GREY,
    count_text,
    page,
    panel,
    plot,
    table,
)
from pollard.compress.report_plots import agreement_text, latency_bars


def rich_table(content: dict[str, Any]) -> Table:
    """Return the profile for a terminal."""
    told = Table(
        title=f"{content['name']}, {content['batch']} image(s), {_threads(content)}",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    told.add_column("layer", overflow="fold")
    told.add_column("operator")
    titles = ["MACs", "params", *(f"{t['target'][4:]}, µs" for t in content["targets"])]
    for title in titles:
        told.add_column(title, justify="right", no_wrap=True)
    for name, kind, channels, _, macs, parameters, *times in _rows(content):
        short = kind.replace(" + Relu", "").replace(" + Clip", "").replace(" /", "/")
        told.add_row(
            escape(name), escape(f"{short} {channels.replace(' ', '')}"), macs, parameters, *times
        )
    first = content["targets"][0]["operations"]
    told.add_section()
    macs, parameters = (count_text(sum(op[key] for op in first)) for key in ("macs", "parameters"))
    sums = [f"{t['summed_us']:,.1f}" for t in content["targets"]]
    told.add_row("sum", "with what a call costs", macs, parameters, *sums)
    whole = [f"{t['measured_us']:,.1f}" for t in content["targets"]]
    told.add_row("measured", "the whole file", "", "", *whole)
    return told


# Kind of part → heading.
_KINDS = {
    "channels": "half of a group of channels taken away",
    "block": "a residual block left out",
    "dense": "a dense layer of a lower rank",
    "8 bits": "a layer in 8 bits",
}


def rich_sensitivity(content: dict[str, Any]) -> Table:
    """Return the sensitivities of a profile for a terminal."""
    told = Table(
        title=f"Sensitivity, on {content['images']} images, each part by itself, untrained",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    told.add_column("part", overflow="fold")
    told.add_column("change")
    told.add_column("nats an image", justify="right", no_wrap=True)
    for kind, heading in _KINDS.items():
        rows = [part for part in content["parts"] if part["kind"] == kind]
        if rows:
            told.add_section()
            told.add_row(f"[bold]{heading}[/bold]", "", "")
        for part in rows:
            told.add_row(escape(part["name"]), escape(part["change"]), f"{part['loss']:.5f}")
    return told


def render_profile(content: dict[str, Any]) -> str:
    """Return the page for the content of a profile file; it loads nothing from anywhere."""
    notes = "".join(f"<li>{html.escape(agreement_text(t))}</li>" for t in content["targets"])
    heads = ("Layer", "Operator", "Channels", "Output", "MACs", "Parameters")
    targets = tuple(f"{t['target'][4:]}, µs" for t in content["targets"])
    machine = content["machine"]
    sections = [
        f"<h1>{html.escape(content['name'])}, layer by layer</h1>"
        f"<p class='muted'>{html.escape(machine['processor'])}, onnxruntime "
        f"{html.escape(machine['onnxruntime'])}, {content['batch']} image(s), "
        f"{_threads(content)}. Each operator was timed by itself.</p><ul>{notes}</ul>",
        "<h2>Where the time goes</h2>",
        panel(latency_bars(content["targets"])),
        "<h2>Time for what is computed</h2><p class='muted'>Each convolution and dense layer by "
        "its multiply-accumulates. What lies high takes long for what it computes.</p>",
        panel(scatter(content["targets"])),
        "<h2>All operators</h2>",
        panel(table((*heads, *targets), _rows(content))),
        *(_sensitivity(content["sensitivity"]) if "sensitivity" in content else ()),
    ]
    return page(f"{content['name']} – Pollard profile", sections)


def _sensitivity(content: dict[str, Any]) -> list[str]:
    """Show what each part carries."""
    why = content["not_pruned"]
    sections = [
        "<h2>How much each part matters</h2>"
        f"<p class='muted'>How far the answers to {content['images']} images move, in nats an "
        "image, when one part alone is changed and the batch norms are measured anew; nothing was "
        "trained. What stands on the left must be kept, what stands on the right is cheap to give "
        "up.</p>" + (f"<p>No channels can be taken away: {html.escape(why)}.</p>" if why else "")
    ]
    for kind, heading in _KINDS.items():
        rows = [part for part in content["parts"] if part["kind"] == kind]
        if not rows:
            continue
        figure = go.Figure(
            go.Bar(
                x=[part["name"] for part in rows],
                y=[part["loss"] for part in rows],
                customdata=[part["change"] for part in rows],
                marker_color=BLUE,
                hovertemplate="%{x}: %{customdata}<br>%{y:.5f} nats<extra></extra>",
            )
        )
        figure.update_xaxes(type="category", tickangle=-45)
        figure.update_yaxes(title="nats an image", rangemode="tozero", exponentformat="power")
        figure.update_layout(title={"text": heading, "font": {"size": 13}})
        sections.append(panel(plot(figure, 360)))
    return sections


def scatter(targets: list[dict[str, Any]]) -> str:
    """Return a plot of latency over MACs: what lies high is slow for what it computes."""
    figure = go.Figure()
    for target, color in zip(targets, (GREY, BLUE), strict=False):
        rows = [row for row in target["operations"] if row["macs"] and row["latency_us"]]
        figure.add_trace(
            go.Scatter(
                x=[row["macs"] for row in rows],
                y=[row["latency_us"] for row in rows],
                text=[row["name"] for row in rows],
                mode="markers",
                cliponaxis=False,
                name=target["target"],
                marker={"color": color, "size": 9, "opacity": 0.8},
                hovertemplate="%{text}<br>%{x:,} MACs<br>%{y:.1f} µs<extra></extra>",
            )
        )
    figure.update_xaxes(title="MACs", rangemode="tozero")
    figure.update_yaxes(title="µs", rangemode="tozero")
    figure.update_layout(legend={"orientation": "h", "y": 1.12})
    return plot(figure, 340)


def _threads(content: dict[str, Any]) -> str:
    return "1 thread" if content["threads"] == 1 else f"{content['threads']} threads"


def _rows(content: dict[str, Any]) -> list[tuple[str, ...]]:
    """Join the targets by name: a file of one may have operators that another has not."""
    targets = content["targets"]
    latencies: list[dict[tuple[str, int], str]] = []
    described: dict[tuple[str, int], dict[str, Any]] = {}
    for target in targets:
        times: dict[tuple[str, int], str] = {}
        count: dict[str, int] = {}
        for row in target["operations"]:
            name = row["name"]
            count[name] = count.get(name, 0) + 1
            taken = row["latency_us"]
            times[name, count[name]] = "?" if taken is None else f"{taken:,.1f}"
            described.setdefault((name, count[name]), row)
        latencies.append(times)
    return [
        (
            name,
            row["kind"],
            f"{row['in_channels']} → {row['out_channels']}",
            row["output"],
            count_text(row["macs"]) if row["macs"] else "–",
            count_text(row["parameters"]) if row["parameters"] else "–",
            *(times.get((name, turn), "–") for times in latencies),
        )
        for (name, turn), row in described.items()
    ]
