"""What a report says of the device that files were judged on, and of float16."""

from __future__ import annotations

import html
from typing import Any

from pollard.compress.half import LARGEST
from pollard.compress.report_parts import faster, panel, table, time_text

_LAYERS = 8


def judged_us(figures: dict[str, Any]) -> float | None:
    """Return the median by which a file was compared, in µs; None where nothing was timed."""
    batch = figures["judged_batch"]
    return next((t["p50_us"] for t in figures["latency"] if t["batch_size"] == batch), None)


def latency_text(figures: dict[str, Any]) -> str:
    """Return the median by which a file was compared, for a table."""
    found = judged_us(figures)
    return "not timed" if found is None else time_text(found)


def speed_text(figures: dict[str, Any]) -> str:
    """Return how many times faster than the parent's float file it is, for a table."""
    speed = figures["speedup"]
    return "–" if speed is None else f"{speed['estimate']:.2f} × ({speed['lower']:.2f})"


def images_text(figures: dict[str, Any]) -> str:
    """Return how many images the compared time is of."""
    batch = figures["judged_batch"]
    return "one image" if batch == 1 else f"{batch} images"


def speed_card(content: dict[str, Any]) -> tuple[str, str, str]:
    """Return title, figure and words of the card on speed."""
    parent, chosen = content["parent"], content["chosen"]
    speed = chosen["speedup"]
    if speed is None:
        return (
            "Latency",
            "not measured",
            f"no GPU was here: {html.escape(content['device']['why_not'])}",
        )
    return (
        f"Latency, {images_text(chosen)}",
        faster(speed["estimate"]),
        f"{latency_text(parent)} → {latency_text(chosen)}; 95 % interval "
        f"{speed['lower']:.2f} to {speed['upper']:.2f}",
    )


def times_faster(content: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> float:
    """Return how many times faster the shipped file is at a batch size.

    Where files were compared by it, this is what was compared: run by run, interleaved.
    """
    speed = content["chosen"]["speedup"]
    if speed is not None and before["batch_size"] == content["chosen"]["judged_batch"]:
        return float(speed["estimate"])
    return float(before["p50_us"] / after["p50_us"])


def shipped_text(content: dict[str, Any]) -> str:
    """Return what the shipped file takes, as the beginning of a sentence."""
    parent, chosen = content["parent"], content["chosen"]
    name = f"The shipped model (<b>{content['summary']['shipped']}</b>)"
    if chosen["speedup"] is None:
        return f"{name} is float16 for CUDA, was <b>not timed on a GPU</b>"
    return (
        f"{name} answers {images_text(chosen)} in <b>{latency_text(chosen)}</b> where its parent "
        f"takes {latency_text(parent)}"
    )


def sections(content: dict[str, Any]) -> list[str]:
    """Return the section on float16; nothing for other targets."""
    ranges = content["chosen"].get("ranges")
    if not ranges:
        return []
    device = content["device"]
    largest = sorted(ranges.items(), key=lambda item: -item[1])[:_LAYERS]
    emulated = (
        f" There was no GPU ({html.escape(device['why_not'])}): accuracy was measured on the "
        "processor with every operator's result rounded to float16; nothing was timed."
        if device["why_not"]
        else f" Judged on {html.escape(device['name'])}."
    )
    rows = [(name, f"{value:,.4g}", f"{value / LARGEST:.2%}") for name, value in largest]
    return [
        "<h2>Float16</h2>",
        "<p>Weights and arithmetic are float16; pixels go in and float32 logits come out."
        f"{emulated} These layers gave the largest activations on calibration images; half of what "
        "float16 holds is allowed.</p>",
        panel(table(("Layer", "Largest activation", "Of what float16 holds"), rows)),
    ]
