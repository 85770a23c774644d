"""The part of a report that says how 8-bit files came about."""

from __future__ import annotations

import html
from typing import Any

from pollard.compress.report_parts import panel, small, table


def sections(content: dict[str, Any]) -> list[str]:
    """Return the section on 8 bits, or nothing where no file was chosen among several."""
    made = [c for c in content["candidates"] if c.get("quantization")]
    if not made:
        return []
    parts = [
        "<h2>8 bits</h2>",
        "<p>Ranges, balanced channels, corrected biases and training cost nothing at run time; "
        "what brought the answers nearest to the float network's, on the choosing part, was "
        "kept. Divergence is the mean Kullback-Leibler divergence of the answers, in nats. "
        "Where no points stand, none were counted: the divergence decided.</p>",
    ]
    for candidate in made:
        told = candidate["quantization"]
        parts.append(f"<p><b>{html.escape(candidate['name'])}</b>: {html.escape(how(told))}</p>")
        rows = [
            (
                trial["name"],
                small(trial["divergence"]),
                "–" if trial.get("drop") is None else f"{trial['drop']:+.2f}",
            )
            for trial in told["trials"]
        ]
        parts.append(panel(table(("Tried", "Divergence", "Points lost"), rows)))
        floats = [
            f"<li>{html.escape(row['layer'])} stayed in float: {html.escape(row['why'])}.</li>"
            for row in told["float_layers"]
        ]
        notes = [f"<li>{html.escape(note)}.</li>" for note in told["notes"]]
        if floats or notes:
            parts.append(f"<ul>{''.join([*floats, *notes])}</ul>")
    return parts


def how(told: dict[str, Any]) -> str:
    """Say in one line how an 8-bit file was made."""
    parts = [f"ranges by {told['method']}"]
    if told["equalized_pairs"]:
        parts.append(f"{told['equalized_pairs']} pairs of layers balanced")
    if told["biases_corrected"]:
        parts.append("biases corrected")
    if told["trained"]:
        parts.append(f"trained in 8 bits for {len(told['trained'].get('loss', []))} epoch(s)")
    floats = len(told["float_layers"])
    parts.append(f"{floats} layer(s) in float" if floats else "every layer in 8 bits")
    gate = "holds the gate" if told["holds"] else "misses the gate"
    return f"{', '.join(parts)}; {gate} on the choosing part ({told['drop']:+.2f} points lost)."
