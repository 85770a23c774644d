"""How servers run the revisions of a model, for `pollard models show`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pollard.client import ModelsClient, PollardError, Server, ServerRevision, Tuning, TuningPoint
from pollard.client.cli._common import ago, say, show_table, warn
from pollard.client.environment import connection

_LONGEST_SECONDS = 5.0
"""What servers do comes beside; nobody waits longer for it."""


def known_servers(address: str, timeout: float) -> list[Server]:
    """Return the servers; none, with a warning, if the manager cannot name them soon.

    What the registry holds is shown all the same: a manager may be older, may not let everybody see
    the servers, or may just have lost the other one that knows them.
    """
    try:
        with ModelsClient(
            address, timeout=min(timeout, _LONGEST_SECONDS), **connection()
        ) as client:
            return client.servers()
    except PollardError as error:
        warn(f"how servers run it is not known: {error}")
        return []


def runs_of(
    servers: Iterable[Server], model: str, revision: int | None = None
) -> list[dict[str, object]]:
    """Return the servers that run a model, with what they say of each revision, for JSON."""
    return [
        {"server_id": server.server_id, "run": run}
        for server, run in _runs(servers, model, revision)
    ]


def show_runs(servers: Sequence[Server], model: str, revision: int | None = None) -> None:
    """Write how each server runs a model; for one revision also what was measured of it.

    Args:
        servers: All there are.
        model: Name of the model.
        revision: Number of the revision; None for all of them.
    """
    runs = list(_runs(servers, model, revision))
    if not runs:
        return
    say("")
    show_table(
        ["SERVER", "REVISION", "WORKERS", "THREADS", "JOINED", "BATCH 1", "BEST", "MEASURED"],
        [
            [
                server.server_id,
                str(run.revision),
                _figure(tuning.workers, "workers", tuning),
                _figure(tuning.threads, "threads", tuning),
                _figure(tuning.joined_batch, "joined_batch", tuning),
                _alone(tuning),
                _best(tuning),
                ago(tuning.measured_time) if tuning.measured_time else "not yet",
            ]
            for server, run in runs
            if (tuning := run.tuning) is not None
        ],
    )
    if any(run.tuning and run.tuning.set_by_hand for _, run in runs):
        say("  * set by hand")
    for place in sorted({_place(run.tuning) for _, run in runs if run.tuning} - {""}):
        say(f"  measured on {place}")
    if revision is not None:
        for server, run in runs:
            _show_points(server, run)


def _runs(
    servers: Iterable[Server], model: str, revision: int | None
) -> Iterator[tuple[Server, ServerRevision]]:
    for server in servers:
        for run in server.revisions:
            wanted = run.model == model and revision in (None, run.revision)
            if wanted and run.tuning is not None:
                yield server, run


def _show_points(server: Server, run: ServerRevision) -> None:
    if run.tuning is None or not run.tuning.points:
        return
    say(f"\n{server.server_id} measured, for {run.tuning.aim}")
    show_table(
        ["THREADS", "AT A TIME", "BATCH", "ROWS/S", "LATENCY"],
        [
            [
                str(point.threads),
                str(point.callers),
                str(point.batch_size),
                f"{point.rows_per_second:,.0f}",
                _time(point),
            ]
            for point in run.tuning.points
        ],
    )


def _figure(value: int, name: str, tuning: Tuning) -> str:
    return f"{value} *" if name in tuning.set_by_hand else str(value)


def _alone(tuning: Tuning) -> str:
    """Return the time of one row with nothing beside it."""
    alone = [
        point
        for point in tuning.points
        if point.callers == 1 and point.batch_size == 1 and point.threads == tuning.threads
    ]
    return _time(alone[0]) if alone else "–"


def _best(tuning: Tuning) -> str:
    best = max((point.rows_per_second for point in tuning.points), default=0.0)
    return f"{best:,.0f}/s" if best else "–"


def _place(tuning: Tuning) -> str:
    if not tuning.processor:
        return ""
    return f"{tuning.processor}, {tuning.cores} cores, onnxruntime {tuning.onnxruntime}"


def _time(point: TuningPoint) -> str:
    if point.latency_us < 10_000:
        return f"{point.latency_us:,.0f} µs"
    return f"{point.latency_us / 1000:,.1f} ms"
