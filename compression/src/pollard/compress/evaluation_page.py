"""An evaluation as text on the terminal and as one self-contained page."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import plotly.graph_objects as go
from rich.markup import escape
from rich.table import Table

from pollard.compress.evaluation import Evaluation
from pollard.compress.evaluation_tasks import TaskEvaluation
from pollard.compress.report_parts import BLUE, GREY, card, page, panel, plot, table
from pollard.compress.report_plots import confusion_map

# Classes that the terminal lists; the page and the JSON have all.
_SHOWN = 40


def rich_table(found: Evaluation | TaskEvaluation) -> Table:
    """Return the classes, the worst first where there are too many for a terminal."""
    if isinstance(found, TaskEvaluation):
        return _task_table(found)
    shown = found.classes
    title = ""
    if len(shown) > _SHOWN:
        shown = sorted(shown, key=lambda figures: figures.f1)[:_SHOWN]
        title = f"the {_SHOWN} worst of {len(found.classes)} classes"
    told = Table(title=title or None)
    told.add_column("class", overflow="fold")
    for column in ("precision", "recall", "F1", "images"):
        told.add_column(column, justify="right", no_wrap=True)
    for one in shown:
        told.add_row(
            escape(one.label), f"{one.precision:.2%}", f"{one.recall:.2%}", f"{one.f1:.2%}",
            f"{one.support:,}",
        )  # fmt: skip
    told.add_section()
    for name, means in (("macro mean", found.macro), ("weighted mean", found.weighted)):
        cells = (f"{means[key]:.2%}" for key in ("precision", "recall", "f1"))
        told.add_row(name, *cells, f"{found.accuracy.samples:,}")
    return told


def _task_table(found: TaskEvaluation) -> Table:
    told = Table()
    told.add_column("class", overflow="fold")
    for column in list(found.classes[0])[1:]:
        told.add_column(column, justify="right", no_wrap=True)
    for one in found.classes[:_SHOWN]:
        told.add_row(*map(escape, _cells(one)))
    return told


def _cells(row: dict[str, Any]) -> list[str]:
    label, *values = row.values()
    return [
        str(label),
        *(
            "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.2%}"
            for value in values
        ),
    ]


def _task_lines(found: TaskEvaluation) -> Iterator[str]:
    yield f"{found.accuracy.title} {found.accuracy}"
    yield ", ".join(f"{name} {value:.2%}" for name, value in found.figures.items())
    if found.damaged:
        yield f"{len(found.damaged)} files were left out: {'; '.join(found.damaged[:10])}"
    if found.compared is not None:
        what = "boxes" if found.task == "detection" else "pixels"
        yield _against(found.compared, what)


def _against(compared: dict[str, Any], what: str) -> str:
    same, points = compared["same_answer"], compared["difference_points"]
    return (
        f"Against {compared['model']} ({compared['accuracy']['value']:.2%}): the same answer to "
        f"{same['value']:.2%} of the {what}, {points['estimate']:+.2f} points "
        f"(95 % interval {points['lower']:+.2f} to {points['upper']:+.2f})"
    )


def _render_task(found: TaskEvaluation) -> str:
    n = found.accuracy
    cards = [card(n.metric, f"{n.value:.2%}", f"n = {n.samples}, {n.lower:.2%} to {n.upper:.2%}")]
    cards += [card(name, f"{value:.2%}", "") for name, value in found.figures.items()]
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in _task_lines(found))
    what = "objects" if found.task == "detection" else "pixels"
    sections = [
        f"<h1>{html.escape(found.model)}</h1><p class='muted'>{html.escape(n.dataset)}</p>",
        f"<div class='cards'>{''.join(cards)}</div><ul>{notes}</ul>",
        f"<h2>Mistakes, in {what}</h2>",
        panel(confusion_map(found.confusion_labels, found.confusion.tolist(), "")),
        "<h2>Classes</h2>",
        panel(
            table(("class", *list(found.classes[0])[1:]), [tuple(_cells(c)) for c in found.classes])
        ),
    ]
    return page(f"{found.model} – Pollard evaluation", sections)


def lines(found: Evaluation | TaskEvaluation) -> Iterator[str]:
    """Yield what there is to say beside the table."""
    if isinstance(found, TaskEvaluation):
        yield from _task_lines(found)
        return
    yield f"Accuracy {found.accuracy}"
    if found.top5 is not None:
        yield f"Among the best 5 {found.top5}"
    lower, upper = found.macro_f1_interval
    yield f"Macro F1 {found.macro['f1']:.2%} (95 % interval {lower:.2%} to {upper:.2%})"
    yield f"Calibration error {found.calibration.error:.2%}, log loss {found.log_loss:.4f}"
    if found.not_finite:
        yield f"{found.not_finite} answers are not finite; they count as wrong"
    if found.damaged:
        yield f"{len(found.damaged)} files were left out: {'; '.join(found.damaged[:10])}"
    if mistakes := found.mistakes()[:3]:
        pairs = ", ".join(f"{true} as {answer} ({n})" for true, answer, n in mistakes)
        yield f"Most frequent mistakes: {pairs}"
    if found.compared is not None:
        yield _against(found.compared, "images")


def render(found: Evaluation | TaskEvaluation) -> str:
    """Return the page; it loads nothing from anywhere."""
    if isinstance(found, TaskEvaluation):
        return _render_task(found)
    names = [one.label for one in found.classes]
    rows = [
        (one.label, f"{one.precision:.2%}", f"{one.recall:.2%}", f"{one.f1:.2%}", str(one.support))
        for one in found.classes
    ]
    n = found.accuracy
    cards = [
        card("accuracy", f"{n.value:.2%}", f"n = {n.samples}, {n.lower:.2%} to {n.upper:.2%}"),
        card("macro F1", f"{found.macro['f1']:.2%}", "mean over the classes"),
        card(
            "calibration error",
            f"{found.calibration.error:.2%}",
            "confidence against accuracy, mean gap",
        ),
        card("log loss", f"{found.log_loss:.4f}", "nats"),
    ]
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in lines(found))
    sections = [
        f"<h1>{html.escape(found.model)}</h1><p class='muted'>{html.escape(n.dataset)}</p>",
        f"<div class='cards'>{''.join(cards)}</div><ul>{notes}</ul>",
        "<h2>Mistakes</h2>",
        panel(confusion_map(names, found.confusion.tolist(), "")),
        *_mistakes(found),
        "<h2>Calibration</h2>",
        panel(reliability(found)),
        "<h2>Classes</h2>",
        panel(table(("class", "precision", "recall", "F1", "images"), rows)),
    ]
    return page(f"{found.model} – Pollard evaluation", sections)


def _mistakes(found: Evaluation) -> list[str]:
    """List the most frequent mistakes, which are hard to find in a map of many classes."""
    rows = [(true, answer, f"{n:,}") for true, answer, n in found.mistakes()]
    if not rows:
        return []
    heads = ("true class", "answered", "images")
    inner = panel(table(heads, rows))
    return [f"<details><summary>The most frequent mistakes</summary>{inner}</details>"]


def reliability(found: Evaluation) -> str:
    """Return a plot of how often answers are right over how sure they are."""
    bins = [one for one in found.calibration.bins if one.samples]
    figure = go.Figure()
    figure.add_trace(
        go.Bar(
            x=[(one.lower + one.upper) / 2 for one in bins],
            y=[one.accuracy for one in bins],
            width=[one.upper - one.lower for one in bins],
            text=[str(one.samples) for one in bins],
            marker={"color": BLUE},
            name="answers",
            hovertemplate="%{text} answers, %{y:.1%} right<extra></extra>",
        )
    )
    figure.add_trace(
        go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": GREY, "dash": "dot"},
                   name="as sure as right")
    )  # fmt: skip
    figure.update_xaxes(title="confidence", range=[0, 1], tickformat=".0%")
    figure.update_yaxes(title="accuracy", range=[0, 1], tickformat=".0%")
    figure.update_layout(legend={"orientation": "h", "y": 1.12})
    return plot(figure, 360)
