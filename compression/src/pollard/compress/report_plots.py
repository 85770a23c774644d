"""The plots of reports."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from pollard.compress.report_device import images_text, judged_us
from pollard.compress.report_parts import (
    BLUE,
    GREEN,
    GREY,
    RED,
    panel,
    plot,
    points,
    time_text,
)

# Names beside a map of mistakes, and their letters.
_TICKS, _LABEL = 24, 18


def scatter(content: dict[str, Any]) -> str:
    """Return a plot of latency against accuracy: the candidates, the gate, the chosen one."""
    figure = go.Figure()
    shipped = content["summary"]["shipped"]
    limit = content["gate"]["max_drop_points"]
    timed = content["device"]["timed"]
    unit = " µs" if timed else " MACs"
    of = images_text(content["chosen"])
    places = [judged_us(c) or c["macs"] for c in content["candidates"]]
    for c in content["candidates"]:
        drop, name = c["drop_points"], c["name"]
        is_parent = name == "parent-fp32"
        color = GREEN if name == shipped else (GREY if is_parent else BLUE)
        figure.add_trace(
            go.Scatter(
                x=[c["macs"] if judged_us(c) is None else judged_us(c)],
                y=[-drop["estimate"]],
                error_y=None
                if is_parent
                else {
                    "type": "data",
                    "symmetric": False,
                    "array": [drop["estimate"] - drop["lower"]],
                    "arrayminus": [drop["upper"] - drop["estimate"]],
                    "thickness": 1.2,
                },
                mode="markers+text",
                text=[f"  {name}{' (shipped)' if name == shipped else ''}  "],
                # Towards the middle, where there is room for it.
                textposition=f"{'top' if name.endswith('fp32') else 'bottom'} "
                f"{'left' if (judged_us(c) or c['macs']) > max(places) / 2 else 'right'}",
                cliponaxis=False,
                marker={
                    "size": 15 if name == shipped else 11,
                    "color": color,
                    "symbol": "star" if name == shipped else "circle",
                },
                hovertemplate=f"{name}<br>%{{x:.1f}}{unit}<br>%{{y:+.2f}} points<extra></extra>",
                showlegend=False,
            )
        )
    figure.add_hline(
        y=-limit,
        line={"color": RED, "dash": "dash"},
        annotation_text=f"gate: at most {points(limit)} lost",
        annotation_position="bottom right",
    )
    title = f"median latency of {of}, µs" if timed else "multiply-accumulates"
    figure.update_xaxes(title=title, rangemode="tozero")
    metric = content["parent"]["accuracy"]["metric"]
    figure.update_yaxes(title=f"{metric} against the parent, points", zeroline=True)
    return plot(figure, 400)


def front_plot(search: dict[str, Any], limit: float, metric: str = "accuracy") -> str:
    """Return a plot of a search: every trial, the front, the gate, and what was chosen."""
    reached = [trial for trial in search["trials"] if trial["outcome"]]
    best = {number: index for index, number in enumerate(search["front"])}
    line = sorted((t for t in reached if t["number"] in best), key=lambda t: best[t["number"]])
    figure = go.Figure()
    for trials, name, mode, color in (
        ([t for t in reached if t["number"] not in best], "other trials", "markers", GREY),
        (line, "front", "lines+markers", BLUE),
        ([t for t in reached if t["number"] == search["chosen"]], "chosen", "markers", GREEN),
    ):
        figure.add_trace(
            go.Scatter(
                x=[trial["outcome"]["latency"] for trial in trials],
                y=[-trial["outcome"]["drop_points"] for trial in trials],
                customdata=[
                    [
                        trial["number"],
                        trial["outcome"]["file"],
                        trial["point"]["importance"],
                        "blocks may go" if trial["point"]["remove_blocks"] else "all blocks stay",
                        trial["point"]["latency"],
                    ]
                    for trial in trials
                ],
                hovertemplate="trial %{customdata[0]}, %{customdata[1]}<br>%{x:.0%} of the latency "
                "(%{customdata[4]:.0%} asked for)<br>%{y:+.2f} points<br>%{customdata[2]}, "
                "%{customdata[3]}<extra></extra>",
                mode=mode,
                name=name,
                marker={
                    "color": color,
                    "size": 15 if name == "chosen" else 9,
                    "symbol": "star" if name == "chosen" else "circle",
                },
            )
        )
    figure.add_hline(
        y=-limit,
        line={"color": RED, "dash": "dash"},
        annotation_text=f"gate: at most {points(limit)} lost",
        annotation_position="bottom right",
    )
    figure.update_xaxes(
        title="measured latency, share of the parent's float file", tickformat=".0%"
    )
    figure.update_yaxes(title=f"{metric} against the parent, points")
    figure.update_layout(legend={"orientation": "h", "y": 1.12})
    return plot(figure, 400)


def search_sections(search: dict[str, Any]) -> list[str]:
    """Show what each choice would have cost, and which were taken."""
    parts = [
        "<h2>What was cut, and why</h2>",
        "<p class='muted'>Sensitivity is how far the answers move, in nats an image, when half of "
        "a group of channels, or a whole block, is taken away by itself, or a dense layer gets a "
        "lower rank, and the batch norms are measured anew. Of all choices those with the least "
        "loss for the latency that the table says they save were taken.</p>",
    ]
    for step in search["steps"]:
        taken = {g["name"]: g for g in step["groups"]}
        half = {}
        for name, group in taken.items():
            known = {abs(int(w) - group["width"] / 2): v for w, v in group["losses"].items()}
            if known:
                half[name] = known[min(known)]
        ranks = {
            f"{name} (rank {(middle := list(rows)[len(rows) // 2])})": (name, rows[middle])
            for name, rows in step["dense"].items()
        }
        losses = {**half, **step["blocks"], **{told: loss for told, (_, loss) in ranks.items()}}
        cut = {n for n, g in taken.items() if g["kept"] < g["width"]} | set(step["removed_blocks"])
        cut |= {told for told, (name, _) in ranks.items() if name in step["ranks"]}
        labels = [
            name if name in ranks else
            f"{name} (block)" if name in step["blocks"] else
            f"{name} ({taken[name]['width']} → {taken[name]['kept']})"
            for name in losses
        ]  # fmt: skip
        figure = go.Figure(
            go.Bar(
                x=labels,
                y=list(losses.values()),
                marker_color=[RED if name in cut else GREY for name in losses],
                hovertemplate="%{x}<br>%{y:.4f} nats<extra></extra>",
            )
        )
        figure.update_xaxes(type="category", tickangle=-45)
        figure.update_yaxes(title="nats an image", exponentformat="power")
        figure.update_layout(title={"text": "red: cut", "font": {"size": 13}})
        parts.append(
            f"<p>Step {step['step']}, by the table of {step['target']}: "
            f"{time_text(step['before']['latency'])} → {time_text(step['after']['latency'])} "
            f"(parent in float: {time_text(search['parent']['latency'])}).</p>"
        )
        parts.append(panel(plot(figure, 380)))
    return parts


def curves(content: dict[str, Any], metric: str = "accuracy") -> str:
    """Return a plot of recovery, or of training, by a figure from 0 to 1."""
    r = content["recovery"]
    epochs = list(range(len(r["choose_accuracy"]) + 1))
    scores = [r["start_accuracy"], *r["choose_accuracy"]]
    # By itself a flat line would be drawn between −100 and 300 %.
    room = max(0.005, (max(scores) - min(scores)) * 0.08)
    figure = go.Figure()
    figure.add_trace(
        go.Scatter(
            x=epochs,
            y=scores,
            mode="lines+markers",
            name=f"{metric} on the choosing images",
            line={"color": GREEN},
        )
    )
    figure.add_trace(
        go.Scatter(
            x=epochs[1:],
            y=r["loss"],
            mode="lines+markers",
            name="training loss (right axis)",
            line={"color": GREY, "dash": "dot"},
            yaxis="y2",
        )
    )
    figure.update_layout(
        yaxis={
            "title": metric,
            "tickformat": ".1%",
            "range": [min(scores) - room, max(scores) + room],
        },
        yaxis2={
            "title": "loss",
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "rangemode": "tozero",
            # By itself it would be marked where the left axis is, at odd values.
            "tickmode": "auto",
        },
        legend={"orientation": "h", "y": 1.15},
    )
    figure.update_xaxes(title="epoch", dtick=max(1, len(epochs) // 12))
    return plot(figure, 340)


def layer_bars(content: dict[str, Any]) -> str:
    """Return a plot of the MACs of each layer."""
    layers = content["layers"]
    names = [layer["name"] for layer in layers]
    figure = go.Figure()
    sides = [("before", "parent", GREY), ("after", "shipped", BLUE)]
    if content["summary"]["shipped"].startswith("parent"):
        sides = [("after", "parent and shipped", BLUE)]
    for key, title, color in sides:
        figure.add_trace(
            go.Bar(
                x=names,
                y=[layer[key]["macs"] if layer[key] else 0 for layer in layers],
                name=title,
                marker_color=color,
            )
        )
    figure.update_layout(barmode="group", legend={"orientation": "h", "y": 1.12})
    figure.update_yaxes(title="MACs")
    figure.update_xaxes(type="category", tickangle=-45 if len(names) > 8 else 0)
    return plot(figure, 340)


def confusion(content: dict[str, Any], side: str, title: str) -> str:
    """Return a map of the mistakes of one side, "parent" or "chosen"."""
    return confusion_map(content["confusion"]["classes"], content["confusion"][side], title)


def confusion_map(classes: list[str], matrix: list[list[int]], title: str) -> str:
    """Return a map of mistakes: how often class i was answered with class j."""
    mistakes = [
        [None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(matrix)
    ]
    few = len(classes) <= 20
    figure = go.Figure(
        go.Heatmap(
            z=mistakes,
            x=classes,
            y=classes,
            text=[
                ["" if i == j or not value else _short_count(value) for j, value in enumerate(row)]
                for i, row in enumerate(matrix)
            ],
            customdata=matrix,
            texttemplate="%{text}" if few else None,
            colorscale=[[0, "#ffffff"], [1, RED]],
            zmin=0,
            showscale=False,
            hovertemplate="true %{y}, answered %{x}: %{customdata}<extra></extra>",
        )
    )
    if few:
        # The diagonal has no colour, so its counts are written beside the map.
        for i, label in enumerate(classes):
            figure.add_annotation(
                x=label,
                y=label,
                text=_short_count(matrix[i][i]),
                showarrow=False,
                font={"color": "#5c6875"},
            )
    # Of many classes only some can be named beside the map; a pointer finds the others.
    shown = range(0, len(classes), -(-len(classes) // _TICKS))
    ticks = {
        "type": "category",
        "showgrid": False,
        "tickmode": "array",
        "tickvals": [classes[i] for i in shown],
        "ticktext": [_short_label(classes[i]) for i in shown],
    }
    figure.update_xaxes(title="answer", **ticks)
    figure.update_yaxes(title="true class", autorange="reversed", **ticks)
    figure.update_layout(title={"text": title, "font": {"size": 14}})
    return plot(figure, 420 if few else 640)


def _short_label(label: str) -> str:
    return label if len(label) <= _LABEL else label[: _LABEL - 1].rstrip() + "…"


def _short_count(value: int) -> str:
    """Return a count that fits into a cell."""
    if value < 10_000:
        return str(value)
    return f"{value / 1000:.0f}k" if value < 1_000_000 else f"{value / 1_000_000:.1f}M"


def agreement_text(target: dict[str, Any]) -> str:
    """Say how the table's sum compares with the whole file."""
    text = (
        f"{target['target']}: the table sums to {time_text(target['summed_us'])}, the whole file "
        f"takes {time_text(target['measured_us'])} ({target['ratio'] - 1:+.1%}"
    )
    text += ")" if target["agrees"] else "; more than 10 % apart: is the machine busy?)"
    missing = [row["name"] for row in target["operations"] if row["latency_us"] is None]
    return text + (f". Not in the sum: {', '.join(missing)}" if missing else "")


def latency_bars(targets: list[dict[str, Any]], names: tuple[str, ...] = ()) -> str:
    """Return a plot of the latency of each operator, a colour for each target."""
    figure = go.Figure()
    for index, (target, color) in enumerate(zip(targets, (GREY, BLUE), strict=False)):
        figure.add_trace(
            go.Bar(
                x=[row["name"] for row in target["operations"]],
                y=[row["latency_us"] for row in target["operations"]],
                customdata=[
                    [row["kind"], row["in_channels"], row["out_channels"], row["output"]]
                    for row in target["operations"]
                ],
                hovertemplate="%{x}<br>%{customdata[0]}, %{customdata[1]} → %{customdata[2]}, "
                "%{customdata[3]}<br>%{y:.1f} µs<extra></extra>",
                name=names[index] if names else target["target"],
                marker_color=color,
            )
        )
    figure.update_layout(barmode="group", legend={"orientation": "h", "y": 1.12})
    figure.update_yaxes(title="µs")
    figure.update_xaxes(type="category", tickangle=-45)
    return plot(figure, 380)
