"""The report as one self-contained HTML page."""

from __future__ import annotations

import html
from typing import Any

from pollard.compress import report_device, report_eight_bits
from pollard.compress.report_parts import (
    bytes_text,
    card,
    code,
    count_text,
    faster,
    moment,
    page,
    panel,
    points,
    signed,
    table,
    time_text,
)
from pollard.compress.report_plots import (
    agreement_text,
    confusion,
    curves,
    front_plot,
    latency_bars,
    layer_bars,
    scatter,
    search_sections,
)

# What is counted in a map of mistakes.
_COUNTED = {"detection": ", in objects", "segmentation": ", in pixels"}


def render_page(content: dict[str, Any]) -> str:
    """Return the page for the content of a report.json; it loads nothing from anywhere."""
    sections = _parent_sections(content) if content["kind"] == "bundle" else _sections(content)
    return page(f"{content['name']} – Pollard report", sections)


def _sections(content: dict[str, Any]) -> list[str]:
    parts = [
        _heading(content),
        _cards(content),
        "<h2>Before and after</h2>",
        f"<p class='muted'>{_held_out_note(content)}</p>",
        panel(_before_after(content)),
        *(_front_sections(content) if content["search"] else []),
        "<h2>Candidates</h2>",
        _candidate_text(content),
        panel(scatter(content)),
        panel(_candidate_table(content)),
    ]
    parts += _stage_notes(content)
    if content["pruning"] and content["pruning"]["search"]:
        parts += search_sections(content["pruning"]["search"])
    parts += report_eight_bits.sections(content)
    parts += report_device.sections(content)
    if content["recovery"]:
        parts += [
            "<h2>Recovery</h2>",
            _recovery_text(content),
            panel(curves(content, content["parent"]["accuracy"]["metric"])),
        ]
    parts += [
        "<h2>Layers</h2>",
        _layer_text(content),
        panel(layer_bars(content)),
        "<details><summary>All layers as a table</summary>"
        f"{panel(_layer_table(content))}</details>",
        *_time_sections(content),
        "<h2>Confusion</h2>",
        f"<p class='muted'>Rows are the true classes, columns the answers, on the held-out images"
        f"{_COUNTED.get(content['data']['task'], '')}. Only mistakes are coloured.</p>",
        f"<div class='two'>{panel(confusion(content, 'parent', 'Parent'))}"
        f"{panel(confusion(content, 'chosen', 'Shipped'))}</div>",
    ]
    return [*parts, *_provenance(content), *_stages(content)]


def _stages(content: dict[str, Any]) -> list[str]:
    rows = [
        (
            stage["name"],
            f"{stage['seconds']:.1f} s",
            "taken from an earlier run" if stage["reused"] else "made in this run",
            stage["key"][:16],
        )
        for stage in content["stages"]
    ]
    heads = ("Stage", "Time", "", "Digest of what went in")
    return [f"<details><summary>Stages</summary>{panel(table(heads, rows))}</details>"]


def _parent_sections(content: dict[str, Any]) -> list[str]:
    return [
        f"<h1>{html.escape(content['name'])}</h1><p class='muted'>Packed as it is, in float, on "
        f"{moment(content['created'])}. Verified and measured; no gate was applied.</p>",
        _parent_cards(content),
        f"<p class='muted'>{_held_out_note(content)}</p>",
        "<h2>Layers</h2>",
        panel(_layer_table(content)),
        "<h2>Confusion</h2>",
        panel(confusion(content, "parent", "Held-out images")),
        *_provenance(content),
    ]


def _heading(content: dict[str, Any]) -> str:
    gate, metric = content["gate"], content["parent"]["accuracy"]["metric"]
    drop, timed = content["chosen"]["drop_points"], content["device"]["timed"]
    return (
        f"<h1>{html.escape(content['name'])}, compressed for {content['target']}</h1>"
        f"<p>{report_device.shipped_text(content)}, and {_lost(drop['estimate'], metric)} "
        f"(at most {points(gate['max_drop_points'])} may be lost).</p>"
        f"<p class='muted'>{moment(content['created'])} on "
        f"{html.escape(content['device']['name'])}, onnxruntime "
        f"{html.escape(content['machine']['onnxruntime'])}"
        f"{', one thread' if content['summary']['judged_batch'] == 1 and timed else ''}; "
        f"the run took {content['seconds']:g} s.</p>"
        + "".join(
            f"<p class='warning'><b>Warning.</b> {html.escape(told[:1].upper() + told[1:])}.</p>"
            for told in content["warnings"]
        )
    )


def _lost(points: float, metric: str) -> str:
    if abs(points) < 0.005:
        return "is as accurate"
    return f"{'loses' if points > 0 else 'gains'} {abs(points):.2f} points of {metric}"


def _cards(content: dict[str, Any]) -> str:
    s, chosen = content["summary"], content["chosen"]
    drop, interval = chosen["drop_points"], chosen["accuracy"]
    return (
        "<div class='cards'>"
        + "".join(
            card(*told)
            for told in (
                report_device.speed_card(content),
                (
                    f"{_metric(interval)}, {content['data']['held_out']} held-out images",
                    f"{interval['value']:.2%}",
                    f"parent {s['accuracy_parent']:.2%}, change {signed(-drop['estimate'])}, "
                    f"95 % interval {signed(-drop['upper'])} to {signed(-drop['lower'])}",
                ),
                (
                    "Model file",
                    f"{s['size_parent_bytes'] / s['size_compressed_bytes']:.1f} × smaller",
                    f"{bytes_text(s['size_parent_bytes'])} → "
                    f"{bytes_text(s['size_compressed_bytes'])}",
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


def _metric(figures: dict[str, Any]) -> str:
    metric = str(figures["metric"])
    return "Accuracy" if metric == "accuracy" else metric


def _parent_cards(content: dict[str, Any]) -> str:
    s, accuracy = content["summary"], content["parent"]["accuracy"]
    return (
        "<div class='cards'>"
        + "".join(
            card(*told)
            for told in (
                (
                    f"{_metric(accuracy)}, {content['data']['held_out']} held-out images",
                    f"{accuracy['value']:.2%}",
                    f"95 % interval {accuracy['lower']:.2%} to {accuracy['upper']:.2%}",
                ),
                ("Latency, one image", time_text(s["latency_ms"] * 1000), "one thread, median"),
                (
                    "Model file",
                    bytes_text(s["size_bytes"]),
                    f"{count_text(s['parameters'])} parameters",
                ),
                ("Multiply-accumulates", count_text(s["macs"]), "per image"),
            )
        )
        + "</div>"
    )


def _held_out_note(content: dict[str, Any]) -> str:
    data = content["data"]
    damaged = f" {len(data['damaged'])} damaged file(s) were left out." if data["damaged"] else ""
    timed = " Latencies are medians of interleaved runs of the written files, as they are served."
    return (
        f"Figures on {data['held_out']} held-out images of {html.escape(data['name'])}, which "
        f"nothing was trained on or chosen by ({html.escape(data['split'])}).{damaged}"
        f"{timed if content['device']['timed'] else ''}"
    )


def _before_after(content: dict[str, Any]) -> str:
    parent, chosen = content["parent"], content["chosen"]
    metric = parent["accuracy"]["metric"]
    rows = [
        (
            {"accuracy": "Top-1 accuracy"}.get(metric, metric),
            _accuracy(parent),
            _accuracy(chosen),
            f"{signed(-chosen['drop_points']['estimate'])} points",
        )
    ]
    for before, after in zip(parent["latency"], chosen["latency"], strict=True):
        rows.append(
            (
                f"Latency, batch {before['batch_size']} (p50 / p99)",
                f"{time_text(before['p50_us'])} / {time_text(before['p99_us'])}",
                f"{time_text(after['p50_us'])} / {time_text(after['p99_us'])}",
                faster(report_device.times_faster(content, before, after)),
            )
        )
    for title, key, form in (
        ("Size of model.onnx", "size_bytes", bytes_text),
        ("Parameters", "parameters", count_text),
        ("Multiply-accumulates", "macs", count_text),
    ):
        rows.append(
            (title, form(parent[key]), form(chosen[key]), f"{chosen[key] / parent[key]:.1%} left")
        )
    rows.append(("Same answer as the parent", "", _share(chosen["agreement_with_parent"]), ""))
    here, there = (f"{side['agreement_with_torch']:.2%}" for side in (parent, chosen))
    rows.append(("Same answer as in PyTorch", here, there, ""))
    return table(("", "Parent", "Shipped", "Change"), rows)


def _accuracy(figures: dict[str, Any]) -> str:
    return _share(figures["accuracy"])


def _share(a: dict[str, Any]) -> str:
    return f"{a['value']:.2%} ({a['lower']:.1%} to {a['upper']:.1%})"


def _candidate_text(content: dict[str, Any]) -> str:
    gate = content["gate"]
    timed = content["device"]["timed"]
    best = "fastest file" if timed else "file with the least to compute"
    equal = "equally fast" if timed else "such"
    budgets = content["recipe"]["budget"]
    within = f" and takes no more than {html.escape(', '.join(budgets))}" if budgets else ""
    return (
        f"<p>Parent and pruned model compete in every form that the target allows. The {best} "
        f"that loses at most {points(gate['max_drop_points'])} on the {content['data']['choose']} "
        f"images kept for choosing{within} is shipped; of two {equal} ones the smaller. "
        "The bars are 95 % intervals of the drop.</p>"
    )


def _candidate_table(content: dict[str, Any]) -> str:
    rows, chosen = [], None
    for index, c in enumerate(content["candidates"]):
        if c["name"] == content["summary"]["shipped"]:
            chosen = index
        drop = c["drop_points"]
        rows.append(
            (
                c["name"],
                f"{c['accuracy']['value']:.2%}",
                "–" if index == 0 else f"{signed(-drop['estimate'])}",
                report_device.latency_text(c),
                "–" if index == 0 else report_device.speed_text(c),
                bytes_text(c["size_bytes"]),
                count_text(c["macs"]),
            )
        )
    metric = _metric(content["parent"]["accuracy"])
    heads = ("", metric, "Points", "Latency", "Speed-up (lower bound)", "Size", "MACs")
    return table(heads, rows, chosen)


def _front_sections(content: dict[str, Any]) -> list[str]:
    search, metric = content["search"], content["parent"]["accuracy"]["metric"]
    failed = [trial for trial in search["trials"] if not trial["outcome"]]
    chosen = next(trial for trial in search["trials"] if trial["number"] == search["chosen"])
    missed = f" {len(failed)} could not be reached." if failed else ""
    return [
        "<h2>Search</h2>",
        f"<p>{len(search['trials'])} points between latency and accuracy were tried, each with "
        "batch norms measured anew and a recovery of less than a third of an epoch: the points "
        f"lost are before full recovery.{missed} Compressed to was "
        f"{chosen['point']['latency']:.0%} of the latency: {html.escape(search['why'])}.</p>",
        panel(front_plot(search, content["gate"]["max_drop_points"], metric)),
    ]


def _stage_notes(content: dict[str, Any]) -> list[str]:
    notes = [
        f"<li>The stage <b>{html.escape(d['stage'])}</b> is not in the shipped file: "
        f"{html.escape(d['why'])}.</li>"
        for d in content["dropped_stages"]
    ]
    told = {d["why"] for d in content["dropped_stages"]}
    notes += [
        f"<li>Beyond the budget: {html.escape(beyond)}.</li>"
        for beyond in content["overruns"].values()
        if beyond not in told
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
        for dense in pruning["dense"]:
            sides = f"{dense['in_features']} → {dense['out_features']}"
            became = "was not factorised"
            if dense["rank"]:
                became = f"became two of rank {dense['rank']}, which began with "
                became += f"{dense['energy']:.1%} of its squared weights"
            notes.append(
                f"<li>Dense layer {html.escape(dense['name'])} ({sides}) {became}: "
                f"{html.escape(dense['why'])}.</li>"
            )
        if rewritten := len(pruning["rewritten_shortcuts"]):
            notes.append(
                f"<li>{rewritten} parameter-free shortcut(s) became equal 1×1 convolutions.</li>"
            )
        for name, why in pruning["left_whole"].items():
            notes.append(f"<li>{html.escape(name)} kept its outputs: {html.escape(why)}.</li>")
    return [f"<ul>{''.join(notes)}</ul>"] if notes else []


def _recovery_text(content: dict[str, Any]) -> str:
    r = content["recovery"]
    stopped = f" It stopped early: {html.escape(r['stopped'])}." if r["stopped"] else ""
    where = f"epoch {r['best_epoch']}" if r["best_epoch"] else "the state before the first epoch"
    return (
        f"<p>Fine-tuned with the parent as teacher; on the choosing images it began at "
        f"{r['start_accuracy']:.2%} after pruning. {where.capitalize()} was kept.{stopped}</p>"
    )


def _layer_text(content: dict[str, Any]) -> str:
    if content["summary"]["shipped"].startswith("parent"):
        return "<p class='muted'>The shipped model has the parent's layers.</p>"
    return (
        "<p class='muted'>Multiply-accumulates of each convolution and dense layer for one image, "
        "before and after pruning.</p>"
    )


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
    if not profiles:
        return []
    notes = "".join(
        f"<li>{name}: {html.escape(agreement_text(found).partition(': ')[2])}</li>"
        for name, found in profiles.items()
    )
    return [
        "<h2>Where the time goes</h2>",
        "<p class='muted'>Each operator of the parent and of the shipped file, timed by itself: "
        "one image, one thread.</p>",
        panel(latency_bars(list(profiles.values()), tuple(profiles))),
        f"<ul>{notes}</ul>",
    ]


def _provenance(content: dict[str, Any]) -> list[str]:
    provenance = {
        "source": content["source"],
        "data": content["data"],
        **content["provenance"],
        "machine": content["machine"],
    }
    return [
        "<h2>Recipe and provenance</h2>",
        f"<div class='two'>{panel(code(content['recipe']))}{panel(code(provenance))}</div>",
    ]
