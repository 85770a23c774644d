"""The report as one self-contained HTML page."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

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
ul { margin: 6px 0 12px; padding-left: 22px; }
"""


def render_page(content: dict[str, Any]) -> str:
    """Return the page for the content of a report.json; it loads nothing from anywhere."""
    sections = _parent_sections(content) if content["kind"] == "bundle" else _sections(content)
    return page(f"{content['name']} – Pollard report", sections)


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


def _sections(content: dict[str, Any]) -> list[str]:
    parts = [
        _heading(content),
        _cards(content),
        "<h2>Before and after</h2>",
        f"<p class='muted'>{_held_out_note(content)}</p>",
        panel(_before_after(content)),
        "<h2>Candidates</h2>",
        _candidate_text(content),
        panel(_scatter(content)),
        panel(_candidate_table(content)),
    ]
    parts += _stage_notes(content)
    if content["pruning"] and content["pruning"]["search"]:
        parts += _search_sections(content["pruning"]["search"])
    if content["recovery"]:
        parts += ["<h2>Recovery</h2>", _recovery_text(content), panel(_curves(content))]
    parts += [
        "<h2>Layers</h2>",
        _layer_text(content),
        panel(_layer_bars(content)),
        "<details><summary>All layers as a table</summary>"
        f"{panel(_layer_table(content))}</details>",
        *_time_sections(content),
        "<h2>Confusion</h2>",
        "<p class='muted'>Rows are the true classes, columns the answers, on the held-out images. "
        "Only mistakes are coloured.</p>",
        f"<div class='two'>{panel(_confusion(content, 'parent', 'Parent'))}"
        f"{panel(_confusion(content, 'chosen', 'Shipped'))}</div>",
    ]
    return [*parts, *_provenance(content)]


def _parent_sections(content: dict[str, Any]) -> list[str]:
    return [
        f"<h1>{html.escape(content['name'])}</h1><p class='muted'>Packed as it is, in float, on "
        f"{html.escape(content['created'])}. Verified and measured; no gate was applied.</p>",
        _parent_cards(content),
        f"<p class='muted'>{_held_out_note(content)}</p>",
        "<h2>Layers</h2>",
        panel(_layer_table(content)),
        "<h2>Confusion</h2>",
        panel(_confusion(content, "parent", "Held-out images")),
        *_provenance(content),
    ]


def _heading(content: dict[str, Any]) -> str:
    summary, gate = content["summary"], content["gate"]
    drop = content["chosen"]["drop_points"]
    return (
        f"<h1>{html.escape(content['name'])}, compressed for {content['target']}</h1>"
        f"<p>The shipped model (<b>{summary['shipped']}</b>) answers one image in "
        f"<b>{time_text(summary['latency_compressed_ms'] * 1000)}</b> where its parent takes "
        f"{time_text(summary['latency_parent_ms'] * 1000)}, and {_lost(drop['estimate'])} "
        f"(at most {_points(gate['max_drop_points'])} may be lost).</p>"
        f"<p class='muted'>{html.escape(content['created'])} on "
        f"{html.escape(content['machine']['processor'])}, onnxruntime "
        f"{html.escape(content['machine']['onnxruntime'])}, one thread; "
        f"the run took {content['seconds']:g} s.</p>"
    )


def _lost(points: float) -> str:
    if abs(points) < 0.005:
        return "is as accurate"
    return f"{'loses' if points > 0 else 'gains'} {abs(points):.2f} points of accuracy"


def _cards(content: dict[str, Any]) -> str:
    s, chosen = content["summary"], content["chosen"]
    speed, drop = chosen["speedup"], chosen["drop_points"]
    interval = chosen["accuracy"]
    return (
        "<div class='cards'>"
        + "".join(
            _card(*card)
            for card in (
                (
                    "Latency, one image",
                    f"{speed['estimate']:.2f} × faster",
                    f"{time_text(s['latency_parent_ms'] * 1000)} → "
                    f"{time_text(s['latency_compressed_ms'] * 1000)}; 95 % interval "
                    f"{speed['lower']:.2f} to {speed['upper']:.2f}",
                ),
                (
                    f"Accuracy, {content['data']['held_out']} held-out images",
                    f"{interval['value']:.2%}",
                    f"parent {s['accuracy_parent']:.2%}, change {_signed(-drop['estimate'])}, "
                    f"95 % interval {_signed(-drop['upper'])} to {_signed(-drop['lower'])}",
                ),
                (
                    "Model file",
                    f"{s['size_parent_bytes'] / s['size_compressed_bytes']:.1f} × smaller",
                    f"{_bytes(s['size_parent_bytes'])} → {_bytes(s['size_compressed_bytes'])}",
                ),
                (
                    "Multiply-accumulates",
                    "unchanged"
                    if s["macs_parent"] == s["macs_compressed"]
                    else f"{s['macs_parent'] / s['macs_compressed']:.1f} × fewer",
                    f"{count_text(s['macs_parent'])} → {count_text(s['macs_compressed'])} "
                    "per image",
                ),
            )
        )
        + "</div>"
    )


def _parent_cards(content: dict[str, Any]) -> str:
    s, accuracy = content["summary"], content["parent"]["accuracy"]
    return (
        "<div class='cards'>"
        + "".join(
            _card(*card)
            for card in (
                (
                    f"Accuracy, {content['data']['held_out']} held-out images",
                    f"{accuracy['value']:.2%}",
                    f"95 % interval {accuracy['lower']:.2%} to {accuracy['upper']:.2%}",
                ),
                ("Latency, one image", time_text(s["latency_ms"] * 1000), "one thread, median"),
                (
                    "Model file",
                    _bytes(s["size_bytes"]),
                    f"{count_text(s['parameters'])} parameters",
                ),
                ("Multiply-accumulates", count_text(s["macs"]), "per image"),
            )
        )
        + "</div>"
    )


def _card(what: str, big: str, how: str) -> str:
    return (
        f"<div class='card'><div class='what'>{what}</div><div class='big'>{big}</div>"
        f"<div class='how'>{how}</div></div>"
    )


def _held_out_note(content: dict[str, Any]) -> str:
    data = content["data"]
    damaged = f" {len(data['damaged'])} damaged file(s) were left out." if data["damaged"] else ""
    return (
        f"Accuracy on {data['held_out']} held-out images of {html.escape(data['name'])}, which "
        f"nothing was trained on or chosen by ({html.escape(data['split'])}).{damaged} Latencies "
        "are medians of interleaved runs of the written files, as they are served."
    )


def _before_after(content: dict[str, Any]) -> str:
    parent, chosen = content["parent"], content["chosen"]
    rows = [
        (
            "Top-1 accuracy",
            _accuracy(parent),
            _accuracy(chosen),
            f"{_signed(-chosen['drop_points']['estimate'])} points",
        )
    ]
    for before, after in zip(parent["latency"], chosen["latency"], strict=True):
        rows.append(
            (
                f"Latency, batch {before['batch_size']} (p50 / p99)",
                f"{time_text(before['p50_us'])} / {time_text(before['p99_us'])}",
                f"{time_text(after['p50_us'])} / {time_text(after['p99_us'])}",
                f"{before['p50_us'] / after['p50_us']:.2f} × faster",
            )
        )
    for title, key, form in (
        ("Size of model.onnx", "size_bytes", _bytes),
        ("Parameters", "parameters", count_text),
        ("Multiply-accumulates", "macs", count_text),
    ):
        rows.append(
            (title, form(parent[key]), form(chosen[key]), f"{chosen[key] / parent[key]:.1%} left")
        )
    rows.append(("Same answer as the parent", "", _share(chosen["agreement_with_parent"]), ""))
    rows.append(("Same answer as in PyTorch", _agreement(parent), _agreement(chosen), ""))
    return table(("", "Parent", "Shipped", "Change"), rows)


def _accuracy(figures: dict[str, Any]) -> str:
    return _share(figures["accuracy"])


def _share(a: dict[str, Any]) -> str:
    return f"{a['value']:.2%} ({a['lower']:.1%} to {a['upper']:.1%})"


def _agreement(figures: dict[str, Any]) -> str:
    return f"{figures['agreement_with_torch']:.2%} of images"


def _candidate_text(content: dict[str, Any]) -> str:
    gate = content["gate"]
    return (
        "<p>Parent and pruned model compete in every form that the target allows. The fastest file "
        f"that loses at most {_points(gate['max_drop_points'])} on the {content['data']['choose']} "
        "images kept for choosing is shipped; of two equally fast ones the smaller. The bars are "
        "95 % intervals of the drop.</p>"
    )


def _scatter(content: dict[str, Any]) -> str:
    figure = go.Figure()
    shipped = content["summary"]["shipped"]
    limit = content["gate"]["max_drop_points"]
    for c in content["candidates"]:
        drop, name = c["drop_points"], c["name"]
        is_parent = name == "parent-fp32"
        color = GREEN if name == shipped else (GREY if is_parent else BLUE)
        figure.add_trace(
            go.Scatter(
                x=[c["latency"][0]["p50_us"]],
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
                text=[f"  {name}{' (shipped)' if name == shipped else ''}"],
                textposition="top right" if name.endswith("fp32") else "bottom right",
                cliponaxis=False,
                marker={
                    "size": 15 if name == shipped else 11,
                    "color": color,
                    "symbol": "star" if name == shipped else "circle",
                },
                hovertemplate=f"{name}<br>%{{x:.1f}} µs<br>%{{y:+.2f}} points<extra></extra>",
                showlegend=False,
            )
        )
    figure.add_hline(
        y=-limit,
        line={"color": RED, "dash": "dash"},
        annotation_text=f"gate: at most {_points(limit)} lost",
        annotation_position="bottom right",
    )
    figure.update_xaxes(title="median latency of one image, µs", rangemode="tozero")
    figure.update_yaxes(title="accuracy against the parent, points", zeroline=True)
    return plot(figure, 400)


def _candidate_table(content: dict[str, Any]) -> str:
    rows, chosen = [], None
    for index, c in enumerate(content["candidates"]):
        if c["name"] == content["summary"]["shipped"]:
            chosen = index
        speed, drop = c["speedup"], c["drop_points"]
        rows.append(
            (
                c["name"],
                f"{c['accuracy']['value']:.2%}",
                "–" if index == 0 else f"{_signed(-drop['estimate'])}",
                time_text(c["latency"][0]["p50_us"]),
                "–" if index == 0 else f"{speed['estimate']:.2f} × ({speed['lower']:.2f})",
                _bytes(c["size_bytes"]),
                count_text(c["macs"]),
            )
        )
    heads = ("", "Accuracy", "Points", "Latency", "Speed-up (lower bound)", "Size", "MACs")
    return table(heads, rows, chosen)


def _stage_notes(content: dict[str, Any]) -> list[str]:
    notes = [
        f"<li>The stage <b>{html.escape(d['stage'])}</b> is not in the shipped file: "
        f"{html.escape(d['why'])}.</li>"
        for d in content["dropped_stages"]
    ]
    pruning = content["pruning"]
    if pruning:
        search = pruning["search"]
        how = (
            f"for {html.escape(', '.join(search['budgets']))}"
            if search
            else f"({pruning['requested']:.1%} were asked for); changed widths are multiples of "
            f"{pruning['rounding']}"
        )
        notes.append(
            f"<li>Pruning removed {pruning['removed']:.1%} of the multiply-accumulates {how}.</li>"
        )
        if blocks := pruning["removed_blocks"]:
            notes.append(f"<li>Removed as a whole: {html.escape(', '.join(blocks))}.</li>")
        if rewritten := len(pruning["rewritten_shortcuts"]):
            notes.append(
                f"<li>{rewritten} parameter-free shortcut(s) became equal 1×1 convolutions.</li>"
            )
        for name, why in pruning["left_whole"].items():
            notes.append(f"<li>{html.escape(name)} kept its outputs: {html.escape(why)}.</li>")
    return [f"<ul>{''.join(notes)}</ul>"] if notes else []


def _search_sections(search: dict[str, Any]) -> list[str]:
    """Show what each choice would have cost, and which were taken."""
    parts = [
        "<h2>What was cut, and why</h2>",
        "<p class='muted'>Sensitivity is how far the answers move, in nats an image, when half of "
        "a group of channels, or a whole block, is taken away by itself and the batch norms are "
        "measured anew. Of all choices those with the least loss for the latency that the table "
        "says they save were taken.</p>",
    ]
    for step in search["steps"]:
        taken = {g["name"]: g for g in step["groups"]}
        half = {}
        for name, group in taken.items():
            known = {abs(int(w) - group["width"] / 2): v for w, v in group["losses"].items()}
            if known:
                half[name] = known[min(known)]
        losses = {**half, **step["blocks"]}
        cut = {n for n, g in taken.items() if g["kept"] < g["width"]} | set(step["removed_blocks"])
        labels = [
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
        figure.update_yaxes(title="nats an image")
        figure.update_layout(title={"text": "red: cut", "font": {"size": 13}})
        parts.append(
            f"<p>Step {step['step']}, by the table of {step['target']}: "
            f"{time_text(step['before']['latency'])} → {time_text(step['after']['latency'])} "
            f"(parent in float: {time_text(search['parent']['latency'])}).</p>"
        )
        parts.append(panel(plot(figure, 380)))
    return parts


def _recovery_text(content: dict[str, Any]) -> str:
    r = content["recovery"]
    stopped = f" It stopped early: {html.escape(r['stopped'])}." if r["stopped"] else ""
    where = f"epoch {r['best_epoch']}" if r["best_epoch"] else "the state before the first epoch"
    return (
        f"<p>Fine-tuned with the parent as teacher; on the choosing images it began at "
        f"{r['start_accuracy']:.2%} after pruning. {where.capitalize()} was kept.{stopped}</p>"
    )


def _curves(content: dict[str, Any]) -> str:
    r = content["recovery"]
    epochs = list(range(len(r["choose_accuracy"]) + 1))
    figure = go.Figure()
    figure.add_trace(
        go.Scatter(
            x=epochs,
            y=[r["start_accuracy"], *r["choose_accuracy"]],
            mode="lines+markers",
            name="accuracy on the choosing images",
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
        yaxis={"title": "accuracy", "tickformat": ".1%"},
        yaxis2={
            "title": "loss",
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "rangemode": "tozero",
        },
        legend={"orientation": "h", "y": 1.15},
    )
    figure.update_xaxes(title="epoch", dtick=max(1, len(epochs) // 12))
    return plot(figure, 340)


def _layer_text(content: dict[str, Any]) -> str:
    if content["summary"]["shipped"].startswith("parent"):
        return "<p class='muted'>The shipped model has the parent's layers.</p>"
    return (
        "<p class='muted'>Multiply-accumulates of each convolution and dense layer for one image, "
        "before and after pruning.</p>"
    )


def _layer_bars(content: dict[str, Any]) -> str:
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


def _layer_table(content: dict[str, Any]) -> str:
    same = content["kind"] == "bundle"
    rows: list[tuple[str, ...]] = []
    for layer in content["layers"]:
        before, after = layer["before"], layer["after"]
        if same:
            rows.append(
                (
                    layer["name"],
                    layer["kind"],
                    layer["output"],
                    f"{after['in_channels']} → {after['out_channels']}",
                    count_text(after["macs"]),
                    count_text(after["parameters"]),
                )
            )
            continue
        rows.append(
            (
                layer["name"],
                layer["kind"],
                layer["output"],
                f"{before['in_channels']} → {before['out_channels']}" if before else "new",
                f"{after['in_channels']} → {after['out_channels']}",
                count_text(before["macs"]) if before else "–",
                count_text(after["macs"]),
                count_text(before["parameters"]) if before else "–",
                count_text(after["parameters"]),
            )
        )
    if same:
        return table(("Layer", "Kind", "Output", "Channels", "MACs", "Parameters"), rows)
    heads = (
        "Layer",
        "Kind",
        "Output",
        "Channels before",
        "after",
        "MACs before",
        "after",
        "Parameters before",
        "after",
    )
    return table(heads, rows)


def _time_sections(content: dict[str, Any]) -> list[str]:
    profiles = content["profiles"]
    notes = "".join(
        f"<li>{name}: {html.escape(agreement_text(found))}</li>" for name, found in profiles.items()
    )
    return [
        "<h2>Where the time goes</h2>",
        "<p class='muted'>Each operator of the parent and of the shipped file, timed by itself: "
        "one image, one thread.</p>",
        panel(latency_bars(list(profiles.values()), tuple(profiles))),
        f"<ul>{notes}</ul>",
    ]


def _confusion(content: dict[str, Any], side: str, title: str) -> str:
    classes, matrix = content["confusion"]["classes"], content["confusion"][side]
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
                ["" if i == j or not value else str(value) for j, value in enumerate(row)]
                for i, row in enumerate(matrix)
            ],
            texttemplate="%{text}" if few else None,
            colorscale=[[0, "#ffffff"], [1, RED]],
            zmin=0,
            showscale=False,
            hovertemplate="true %{y}, answered %{x}: %{text}<extra></extra>",
        )
    )
    if few:
        # The diagonal has no colour, so its counts are written beside the map.
        for i, label in enumerate(classes):
            figure.add_annotation(
                x=label, y=label, text=str(matrix[i][i]), showarrow=False, font={"color": "#5c6875"}
            )
    figure.update_xaxes(type="category", title="answer", showgrid=False, dtick=1)
    figure.update_yaxes(type="category", title="true class", autorange="reversed", showgrid=False)
    figure.update_layout(title={"text": title, "font": {"size": 14}})
    return plot(figure, 420)


def _provenance(content: dict[str, Any]) -> list[str]:
    provenance = {
        "source": content["source"],
        "data": content["data"],
        **content["provenance"],
        "machine": content["machine"],
    }
    return [
        "<h2>Recipe and provenance</h2>",
        f"<div class='two'>{panel(_code(content['recipe']))}{panel(_code(provenance))}</div>",
    ]


def _code(value: object) -> str:
    return f"<pre>{html.escape(json.dumps(value, indent=2))}</pre>"


def panel(inner: str) -> str:
    """Return a frame around a part of the page."""
    return f"<div class='panel' style='margin-top:12px'>{inner}</div>"


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
        font={"family": "system-ui, sans-serif", "size": 13},
        autosize=True,
    )
    drawn: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True}
    )
    return drawn


def _signed(points: float) -> str:
    # Without the sign of a negative zero.
    return f"{round(points, 2) + 0.0:+.2f}"


def _points(value: float) -> str:
    return f"{value:g} point{'' if value == 1 else 's'}"


def time_text(us: float) -> str:
    """Return a duration in a fitting unit."""
    if us < 1000:
        return f"{us:.1f} µs"
    return f"{us / 1000:.2f} ms" if us < 100_000 else f"{us / 1000:.0f} ms"


def _bytes(count: float) -> str:
    if count < 10_000:
        return f"{count:.0f} B"
    return f"{count / 1000:.1f} kB" if count < 1_000_000 else f"{count / 1_000_000:.2f} MB"


def count_text(value: float) -> str:
    """Return a count in a fitting unit."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f}"


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
