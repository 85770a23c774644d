"""How a rollout looks to people: what its step has seen, once or while it goes on."""

from __future__ import annotations

import sys
import time

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pollard.client import DeadlineExceeded, ModelsClient, Rollout, Unavailable
from pollard.client.cli._common import printable, say, show_picture, stdout
from pollard.client.types import RevisionEvidence, RolloutEvidence

_LOOK_SECONDS = 1.0

_MARKS = {"HOLDS": "holds", "WAITING": "too early", "FAILED": "FAILED"}


def where(item: Rollout) -> str:
    """Return the state of a rollout and, while it goes on, its step."""
    state = item.state.lower().replace("_", " ")
    if item.end_time is not None:
        return state
    if item.step < 0:
        alone = f"only shadows ({item.shadow_percent:g} %)"
        return alone if item.state == "SHADOW" else f"{state}, {alone}"
    return f"{state}, step {item.step + 1} of {len(item.steps)} ({item.steps[item.step]:g} %)"


def show(item: Rollout) -> None:
    """Write what the step of a rollout has seen."""
    show_picture(picture(item))


def picture(item: Rollout) -> RenderableType:
    """Return a rollout with all that its step has seen."""
    head = Text(
        f"{item.model}: rollout {item.number} of {item.alias}, revision {item.base_revision} to "
        f"{item.revision}: {where(item)}"
    )
    parts: list[RenderableType] = [head]
    if item.evidence is not None:
        parts += [_numbers(item, item.evidence), *_shadows(item.evidence)]
        parts += [_gates(item.evidence)]
        if item.end_time is None:
            waiting = ", ".join(item.evidence.waiting_for)
            parts.append(Text(f"The next step waits for {waiting}." if waiting else "Going on."))
    elif item.end_time is None:
        parts.append(Text("Every server loads the revision and its routes before the first step."))
    for failure in item.failures:
        words = f"not on {failure.server_id}, which refused it: {failure.message}"
        parts.append(Text(printable(words)))
    if item.error:
        parts.append(Text(printable(item.error)))
    return Group(*parts)


def watch(client: ModelsClient, item: Rollout) -> Rollout:
    """Follow a rollout until it has ended; live on a terminal, else a line for each change."""
    console = stdout()
    if not console.is_terminal:
        said = ""
        while True:
            if (now := where(item)) != said:
                say(f"{item.model}: rollout {item.number}: {now}")
                said = now
            if item.end_time is not None:
                show(item)
                return item
            item = look_again(client, item)
    with Live(picture(item), console=console, auto_refresh=False) as live:
        while item.end_time is None:
            item = look_again(client, item)
            live.update(picture(item), refresh=True)
    return item


def look_again(client: ModelsClient, item: Rollout) -> Rollout:
    """Return a rollout a moment later; as it was, if the manager cannot be reached just then."""
    time.sleep(_LOOK_SECONDS)
    try:
        return client.rollout(item.model, item.number)
    except (Unavailable, DeadlineExceeded) as error:
        print(f"waiting for the manager: {error}", file=sys.stderr)
        return item


def _numbers(item: Rollout, evidence: RolloutEvidence) -> Table:
    table = Table("REVISION", "REQUESTS", "FAILED", "P50", "P99", "IMAGES", "FAILED", box=None)

    def row(number: int, seen: RevisionEvidence) -> None:
        table.add_row(
            str(number),
            f"{seen.requests:,}",
            f"{seen.failed:,}",
            _ms(seen.p50_ms),
            _ms(seen.p99_ms),
            f"{seen.images:,}",
            f"{seen.images_failed:,}",
        )

    row(item.base_revision, evidence.base)
    row(item.revision, evidence.revision)
    return table


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value else "–"


def _shadows(evidence: RolloutEvidence) -> list[Text]:
    shadow = evidence.shadow
    if shadow is None:
        return []
    agreed = (
        f"{shadow.agreed / shadow.items:.2%} of {shadow.items:,} items" if shadow.items else "–"
    )
    return [
        Text(
            f"Shadows: {shadow.compared:,} compared, {shadow.dropped:,} dropped, {shadow.failed:,} "
            f"failed; agreement {agreed}; relative distance p50 {shadow.distance_p50:.2g}, p99 "
            f"{shadow.distance_p99:.2g}"
        )
    ]


def _gates(evidence: RolloutEvidence) -> Table:
    table = Table("GATE", "STATE", "WHAT WAS SEEN", box=None)
    for gate in evidence.gates:
        state = _MARKS.get(gate.state, gate.state)
        table.add_row(gate.gate, state, Text(gate.words, overflow="fold"))
    return table
