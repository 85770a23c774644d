"""`pollard tokens`: who may do what."""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from pollard.client import ModelsClient, Token, TokenLimits
from pollard.client._names import checked_token_name
from pollard.client._tokens import checked_role
from pollard.client.cli._common import (
    MODELS_SERVER,
    JsonOption,
    ModelsServerOption,
    TimeoutOption,
    ago,
    checked_by,
    note,
    plain,
    print_json,
    say,
    show_table,
    size,
)
from pollard.client.environment import connection

app = typer.Typer(
    help="Make tokens for those who call the services, list and revoke them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
_SIZES = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def duration(text: str) -> str:
    """Return a time such as "90d" as it was written, or say why it is none."""
    _seconds(text)
    return text


def amount(text: str) -> str:
    """Return a size such as "5GB" as it was written, or say why it is none."""
    _bytes(text)
    return text


def _seconds(text: str) -> float | None:
    if text == "never":
        return None
    found = re.fullmatch(r"(\d+)(s|min|h|d|w|y)", text)
    if found is None or int(found[1]) == 0:
        raise ValueError(f"{text!r} must be a time such as 30min, 12h, 90d, 1y, or never")
    return float(int(found[1]) * _UNITS[found[2]])


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+) ?(kB|MB|GB|TB|)", text)
    if found is None:
        raise ValueError(f"{text!r} must be a size such as 500MB or 20GB")
    return int(found[1]) * _SIZES[found[2]]


@app.command()
def create(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Who will have it: a name out of a-z, 0-9, '-', '_' and '.'.",
            callback=checked_by(checked_token_name),
        ),
    ],
    role: Annotated[
        str,
        typer.Option(
            "--role",
            metavar="ROLE",
            help="viewer (sees), predictor (asks models), publisher (changes models), admin "
            "(everything), or server (for Pollard's services among themselves).",
            callback=checked_by(checked_role),
        ),
    ],
    expires: Annotated[
        str,
        typer.Option(
            "--expires",
            metavar="TIME",
            help="How long it is valid: 30min, 12h, 90d, 1y, or never.",
            callback=checked_by(duration),
        ),
    ] = "90d",
    rate: Annotated[
        float,
        typer.Option("--rate", min=0, help="Requests a second on each server; 0 as the server."),
    ] = 0.0,
    burst: Annotated[
        float, typer.Option("--burst", min=0, help="Requests that may come at once beyond that.")
    ] = 0.0,
    concurrent: Annotated[
        int,
        typer.Option(
            "--concurrent", min=0, help="Requests in flight on each server; 0 as the server."
        ),
    ] = 0,
    streams: Annotated[
        int, typer.Option("--streams", min=0, help="Open streams on each server; 0 as the server.")
    ] = 0,
    message_size: Annotated[
        str,
        typer.Option(
            "--message-size",
            metavar="SIZE",
            help="Largest message, such as 4MB; 0 as the server.",
            callback=checked_by(amount),
        ),
    ] = "0",
    stored: Annotated[
        str,
        typer.Option(
            "--stored",
            metavar="SIZE",
            help="Bundles that its holder may store, such as 20GB in all; 0 for any.",
            callback=checked_by(amount),
        ),
    ] = "0",
    as_json: JsonOption = False,
    server: ModelsServerOption = MODELS_SERVER,
    timeout: TimeoutOption = 30.0,
) -> None:
    """Make a token and print it: the one time that it can be seen.

    The token alone goes to standard output, so that it can be led into a file. Servers know it
    within seconds.
    """
    limits = TokenLimits(rate, burst, concurrent, streams, _bytes(message_size), _bytes(stored))
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        made = client.create_token(name, role, ttl_seconds=_seconds(expires), limits=limits)
    if as_json:
        print_json({**plain(made.token), "secret": made.secret})
        return
    note(f"Token {made.token.token_id} for {name}, {role}, ends {_when(made.token.expire_time)}.")
    note("Keep it now: it cannot be shown again. Callers send it as POLLARD_TOKEN, or token=….")
    print(made.secret)


@app.command("list")
def list_(
    ended: Annotated[
        bool, typer.Option("--ended", help="Also those that were revoked or have expired.")
    ] = False,
    as_json: JsonOption = False,
    server: ModelsServerOption = MODELS_SERVER,
    timeout: TimeoutOption = 30.0,
) -> None:
    """List the tokens; never their secrets."""
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        found = client.tokens(show_ended=ended)
    if as_json:
        print_json(found)
        return
    if not found:
        say("There are no tokens; `pollard tokens create NAME --role ROLE` makes one.")
        return
    show_table(
        ("TOKEN", "NAME", "ROLE", "ENDS", "LIMITS", "MADE", "BY"),
        [
            (
                token.token_id,
                token.name,
                token.role,
                "revoked" if token.revoke_time else _when(token.expire_time),
                _limits(token),
                ago(token.create_time),
                token.creator,
            )
            for token in found
        ],
    )


@app.command()
def revoke(
    token: Annotated[
        str,
        typer.Argument(metavar="TOKEN", help="Id of the token, as `pollard tokens list` has it."),
    ],
    server: ModelsServerOption = MODELS_SERVER,
    timeout: TimeoutOption = 30.0,
) -> None:
    """End a token for good; servers refuse it within seconds."""
    # Whoever has only the token itself may give that.
    token_id = token.split("_")[1] if token.startswith("plrd_") and token.count("_") == 2 else token
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        ended = client.revoke_token(token_id)
    say(f"Token {ended.token_id} of {ended.name} is revoked.")


@app.command()
def whoami(
    as_json: JsonOption = False,
    server: ModelsServerOption = MODELS_SERVER,
    timeout: TimeoutOption = 30.0,
) -> None:
    """Say who you are to the manager, with what the environment holds."""
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        caller = client.caller()
    if as_json:
        print_json(caller)
    elif caller.kind == "open":
        say("Nobody has to show anything there: everybody may do everything.")
    else:
        say(f"{caller.name}, {caller.role}, by {caller.kind}, ends {_when(caller.expire_time)}.")


@app.command()
def generate() -> None:
    """Print a token that no manager knows yet, to begin an installation with.

    Written to admin.token and server.token in the directory that `pollard serve models
    --initial-tokens` names, two of them are let in at its start.
    """
    from pollard.client._tokens import generate_secret

    print(generate_secret())


def _when(moment: datetime | None) -> str:
    if moment is None:
        return "never"
    left = (moment - datetime.now(UTC)).total_seconds()
    if left <= 0:
        return "expired"
    for unit in ("d", "h", "min"):
        if left >= 2 * _UNITS[unit]:
            return f"in {int(left // _UNITS[unit])} {unit}"
    return f"in {int(left)} s"


def _limits(token: Token) -> str:
    words = {
        "requests_per_second": "{:g}/s",
        "burst": "burst {:g}",
        "concurrent_requests": "{} in flight",
        "streams": "{} streams",
        "message_bytes": "messages {}",
        "stored_bytes": "stores {}",
    }
    return ", ".join(
        words[name].format(size(value) if name.endswith("bytes") else value)
        for name, value in asdict(token.limits).items()
        if value > 0
    )
