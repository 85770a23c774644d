"""`pollard models rollout`: an alias moves in steps, and back by itself when that is worse."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

import typer

from pollard.client import ModelsClient, Rollout
from pollard.client.cli import rollout_view
from pollard.client.cli._common import (
    MODELS_SERVER,
    AliasOption,
    EtagOption,
    JsonOption,
    ModelArgument,
    ModelsServerOption,
    QuorumOption,
    RequestIdOption,
    TimeoutOption,
    ago,
    fail,
    print_json,
    say,
    show_table,
)
from pollard.client.cli.rollout_view import where
from pollard.client.environment import connection

_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def register(app: typer.Typer) -> None:
    """Add the command to `pollard models`."""
    app.command()(rollout)


def percent(text: str) -> float:
    """Return a share in percent, written with or without the sign."""
    return _number(text.strip().removesuffix("%"), text)


def rate(text: str) -> float:
    """Return a share between 0 and 1, written as such or in percent."""
    if text.strip().endswith("%"):
        return percent(text) / 100
    return _number(text, text)


def seconds(text: str) -> float:
    """Return a duration such as "90", "90s", "500ms", "2min" or "1h" in seconds."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*(ms|s|m|min|h|d|)\s*", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no duration; write 90s, 500ms, 2min or 1h")
    return _number(found[1], text) * _UNITS[found[2]]


def shares(text: str) -> list[float]:
    """Return several shares in percent, separated by commas."""
    return [percent(part) for part in text.split(",")]


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{whole!r} is no number") from None


def _agreement(text: str) -> float | None:
    return None if text == "auto" else rate(text)


def _readable(read: Callable[[str], object]) -> Callable[[str], str]:
    """Make a reader into a check of the command line's, which names the option."""

    def callback(text: str) -> str:
        read(text)
        return text

    return callback


def rollout(
    model: ModelArgument,
    revision: Annotated[
        int | None, typer.Argument(metavar="REVISION", min=1, help="Revision to move to.")
    ] = None,
    alias: AliasOption = None,
    shadow: Annotated[
        str,
        typer.Option(
            metavar="PERCENT", help="Requests also sent as shadows.", callback=_readable(percent)
        ),
    ] = "0%",
    steps: Annotated[
        str,
        typer.Option(
            metavar="PERCENTS",
            help="Shares of the steps, the last 100.",
            callback=_readable(shares),
        ),
    ] = "5,25,50,100",
    hold: Annotated[
        str,
        typer.Option(
            metavar="DURATION",
            help="How long each step lasts at least.",
            callback=_readable(seconds),
        ),
    ] = "60s",
    min_requests: Annotated[
        int, typer.Option(min=1, help="Requests to the revision that each step must have seen.")
    ] = 200,
    max_error_rate: Annotated[
        str,
        typer.Option(
            metavar="RATE", help="Largest rate of failed requests.", callback=_readable(rate)
        ),
    ] = "0.5%",
    max_p99_ratio: Annotated[
        float, typer.Option(min=1.0, help="Largest ratio of the p99 latencies.")
    ] = 1.2,
    min_agreement: Annotated[
        str,
        typer.Option(
            metavar="RATE",
            help="Smallest agreement of shadows; 0 judges none, auto takes what the bundle says, "
            "less 2 points.",
            callback=_readable(_agreement),
        ),
    ] = "auto",
    quorum: QuorumOption = None,
    pause: Annotated[bool, typer.Option("--pause", help="Keep it at its step.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on.")] = False,
    promote: Annotated[bool, typer.Option("--promote", help="Go to 100 % now.")] = False,
    abort: Annotated[bool, typer.Option("--abort", help="Go back now.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow it until it ends; exit with 1 if taken back.")
    ] = False,
    etag: EtagOption = "",
    request_id: RequestIdOption = None,
    as_json: JsonOption = False,
    server: ModelsServerOption = MODELS_SERVER,
    timeout: TimeoutOption = 30.0,
) -> None:
    """Move an alias to a revision in steps, and back when it is worse.

    The alias is production unless --alias names another. Without a REVISION, list the model's
    rollouts with what the one that runs has seen, or tell it what to do.
    """
    orders = [pause, resume, promote, abort].count(True)
    if orders > 1 or (orders and revision is not None):
        raise typer.BadParameter("give a REVISION, or one of --pause, --resume, --promote, --abort")
    if etag and not orders:
        raise typer.BadParameter("--etag is for --pause, --resume, --promote and --abort")
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        if revision is not None:
            found = client.start_rollout(
                model,
                revision,
                alias=alias or "production",
                steps=shares(steps),
                hold=seconds(hold),
                min_requests=min_requests,
                max_error_rate=rate(max_error_rate),
                max_p99_ratio=max_p99_ratio,
                shadow_percent=percent(shadow),
                min_agreement=_agreement(min_agreement),
                quorum=quorum,
                request_id=request_id,
            )
        else:
            known = [item for item in client.rollouts(model) if alias in (None, item.alias)]
            if not orders and not watch:
                known = _with_evidence(client, known)
                print_json(known) if as_json else _list(model, known)
                return
            running = [item for item in known if item.end_time is None]
            if len(running) != 1:
                which = ", ".join(item.alias for item in running)
                fail(
                    f"several rollouts of {model} run; choose by --alias: {which}"
                    if running
                    else f"no rollout of {model} runs"
                )
                raise typer.Exit(1)
            number = running[0].number
            if not orders:
                found = client.rollout(model, number)
            elif pause:
                found = client.pause_rollout(model, number, etag=etag, request_id=request_id)
            elif resume:
                found = client.resume_rollout(model, number, etag=etag, request_id=request_id)
            elif promote:
                found = client.promote_rollout(model, number, etag=etag, request_id=request_id)
            else:
                found = client.abort_rollout(model, number, etag=etag, request_id=request_id)
        if watch:
            found = _follow(client, found, quiet=as_json)
    if as_json:
        print_json(found)
    elif not watch:
        say(f"{model}: rollout {found.number} of {found.alias}: {where(found)}")
        if found.end_time is None:
            say(f"To follow it: pollard models rollout {model} --watch")
    if watch and found.state == "ROLLED_BACK":
        raise typer.Exit(1)


def _follow(client: ModelsClient, found: Rollout, *, quiet: bool) -> Rollout:
    if not quiet:
        return rollout_view.watch(client, found)
    while found.end_time is None:
        found = rollout_view.look_again(client, found)
    return found


def _with_evidence(client: ModelsClient, known: list[Rollout]) -> list[Rollout]:
    """Ask for what those that run have seen, or the newest if none runs."""
    wanted = {item.number for item in known if item.end_time is None}
    wanted = wanted or {item.number for item in known[:1]}
    return [
        client.rollout(item.model, item.number) if item.number in wanted else item for item in known
    ]


def _list(model: str, found: list[Rollout]) -> None:
    if not found:
        say(f"{model} has no rollouts; `pollard models rollout {model} REVISION` begins one.")
        return
    show_table(
        ["ROLLOUT", "ALIAS", "FROM", "TO", "STATE", "BEGAN", "ERROR"],
        [
            [
                str(item.number),
                item.alias,
                str(item.base_revision),
                str(item.revision),
                where(item),
                ago(item.create_time),
                item.error or "–",
            ]
            for item in found
        ],
    )
    for item in found:
        if item.evidence is not None:
            say("")
            rollout_view.show(item)
