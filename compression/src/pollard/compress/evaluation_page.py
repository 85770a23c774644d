"""An evaluation as text on the terminal and as one self-contained page."""

from __future__ import annotations

import html
from collections.abc import Iterator

import plotly.graph_objects as go
from rich.table import Table

from pollard.compress.evaluation import Evaluation
from pollard.compress.report_parts import BLUE, GREY, card, page, panel, plot, table
from pollard.compress.report_plots import confusion_map

# Classes that the terminal lists; the page and the JSON have all.
_SHOWN = 40


def rich_table(found: Evaluation) -> Table:
    """Return the classes, the worst first where there are too many for a terminal."""
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
            one.label, f"{one.precision:.2%}", f"{one.recall:.2%}", f"{one.f1:.2%}",
            f"{one.support:,}",
        )  # fmt: skip
    told.add_section()
    for name, means in (("macro mean", found.macro), ("weighted mean", found.weighted)):
        cells = (f"{means[key]:.2%}" for key in ("precision", "recall", "f1"))
        told.add_row(name, *cells, f"{found.accuracy.samples:,}")
    return told


def lines(found: Evaluation) -> Iterator[str]:
    """Yield what there is to say beside the table."""
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
        same, points = found.compared["same_answer"], found.compared["difference_points"]
        yield (
            f"Against {found.compared['model']} ({found.compared['accuracy']['value']:.2%}): the "
            f"same answer to {same['value']:.2%} of the images, {points['estimate']:+.2f} points "
            f"(95 % interval {points['lower']:+.2f} to {points['upper']:+.2f})"
        )


def render(found: Evaluation) -> str:
    """Return the page; it loads nothing from anywhere."""
    names = [one.label for one in found.classes]
    rows = [
        (one.label, f"{one.precision:.2%}", f"{one.recall:.2%}", f"{one.f1:.2%}", str(one.support))
        for one in found.classes
    ]
    n = found.accuracy
    cards = [
        card("accuracy", f"{n.value:.2%}", f"n = {n.samples}, {n.lower:.2%} to {n.upper:.2%}"),
        card("macro F1", f"{found.macro['f1']:.2%}", "mean over the classes"),
        card("calibration error", f"{found.calibration.error:.2%}", "said against right"),
        card("log loss", f"{found.log_loss:.4f}", "nats"),
    ]
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in lines(found))
    sections = [
        f"<h1>{html.escape(found.model)}</h1><p class='muted'>{html.escape(n.dataset)}</p>",
        f"<div class='cards'>{''.join(cards)}</div><ul>{notes}</ul>",
        "<h2>Mistakes</h2>",
        panel(confusion_map(names, found.confusion.tolist(), "")),
        "<h2>Calibration</h2>",
        panel(reliability(found)),
        "<h2>Classes</h2>",
        panel(table(("class", "precision", "recall", "F1", "images"), rows)),
    ]
    return page(f"{found.model} – Pollard evaluation", sections)


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
            name="right",
            hovertemplate="%{text} answers, %{y:.1%} right<extra></extra>",
        )
    )
    figure.add_trace(
        go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": GREY, "dash": "dot"},
                   name="as sure as right")
    )  # fmt: skip
    figure.update_xaxes(title="confidence", range=[0, 1], tickformat=".0%")
    figure.update_yaxes(title="right", range=[0, 1], tickformat=".0%")
    figure.update_layout(legend={"orientation": "h", "y": 1.12})
    return plot(figure, 360)
