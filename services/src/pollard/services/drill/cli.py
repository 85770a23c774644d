"""`pollard drill`.

This module is imported by every `pollard` command, so it imports nothing heavy by itself.
"""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Prove on this machine what Pollard promises.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def drill() -> None:
    """Prove on this machine what Pollard promises."""


class Victim(enum.StrEnum):
    """What can be killed."""

    INFERENCE = "inference"
    PREPROCESS = "preprocess"
    MANAGER = "manager"
    RANDOM = "random"


_UNITS = {"s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def _percent(text: str) -> float:
    if text.strip() == "closed":
        return 0.0
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", text)
    if found is None or not 1 <= float(found[1]) <= 100:
        raise typer.BadParameter(f'{text!r} is neither 1% to 100% nor "closed"')
    return float(found[1])


def _seconds(text: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|)\s*", text)
    if found is None or float(found[1]) == 0:
        raise typer.BadParameter(f"{text!r} is no duration; write 90s, 20min or 2h")
    return float(found[1]) * _UNITS[found[2]]


def _revisions(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if found is None or found[1] == found[2] or "0" in (found[1], found[2]):
        raise typer.BadParameter(f"{text!r} is not two revisions; write 1,2")
    return int(found[1]), int(found[2])


def _steps(text: str) -> tuple[str, ...]:
    from pollard.services.drill.options import STEPS

    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [step for step in found if step not in STEPS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is no step; there are {', '.join(STEPS)}")
    return found


@app.command()
def swap(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A model of a running installation; without it the drill brings its own.",
        ),
    ] = None,
    revisions: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Revisions of MODEL to swap between; default: the newest two."
        ),
    ] = None,
    alias: Annotated[
        str, typer.Option(metavar="ALIAS", help="Alias that is swapped.")
    ] = "production",
    swaps: Annotated[int, typer.Option(min=1, help="How often.")] = 20,
    pause: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.0,
            help="From one swap to the next; longer than --drain, so that each swap loads.",
        ),
    ] = 1.5,
    load: Annotated[
        str,
        typer.Option(
            metavar="PERCENT",
            help="Requests, in percent of what the services can answer, which is measured first; "
            '"closed": each client asks without pause.',
        ),
    ] = "70%",
    clients: Annotated[int, typer.Option(min=1, max=256, help="Clients that ask.")] = 8,
    model_mb: Annotated[
        float, typer.Option(min=0.1, max=2000.0, help="Size of the drill's own model, in MB.")
    ] = 10.0,
    kill: Annotated[
        Victim | None,
        typer.Option(help="Afterwards, kill this service in the middle of things; with --kills."),
    ] = None,
    kills: Annotated[int, typer.Option(min=0, help="How often.")] = 0,
    steps: Annotated[
        str, typer.Option(metavar="STEPS", help="In the middle of what, separated by commas.")
    ] = "upload,verify,rollout,swap,collect",
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Decides what is killed and when; default: a new one, printed."),
    ] = None,
    manager: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Drill a running installation, without kills; default: services of the drill's "
            "own, on free ports and in a temporary directory.",
        ),
    ] = None,
    vision: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Its preprocess and vision service.")
    ] = None,
    inference: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Its inference service.")
    ] = None,
    drain: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.0,
            help="How long the drill's own services keep a revision that is no longer served; "
            "longer than any request takes.",
        ),
    ] = 1.0,
    max_time: Annotated[
        str, typer.Option(metavar="DURATION", help="Stop after so long, finished or not.")
    ] = "1h",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")
    ] = None,
) -> None:
    """Swap a model under load, and check every answer.

    Starts services of its own, registers two revisions whose answers can be told apart, keeps
    clients asking through VisionService and ModelInfer, and swaps. Each answer is compared with
    what the revision that it names answers offline. With --kill, services are then killed with
    SIGKILL in the middle of uploads, checks, rollouts, swaps and deletions, and nothing may be
    lost.

    Ends with exit code 1 when a single request failed or was answered wrongly, or when not
    everything could be done within --max-time. Ctrl-C ends it and prints what was seen.
    """
    given = [manager, vision, inference]
    if model is not None and not any(given):
        raise typer.BadParameter(
            "MODEL is a model of a running installation; say which with --manager, --vision and "
            "--inference"
        )
    if revisions is not None and model is None:
        raise typer.BadParameter("--revisions belongs to a MODEL")
    if (kills or kill) and any(given):
        raise typer.BadParameter(
            "a running installation is not killed; leave --manager, --vision and --inference out"
        )
    from pollard.services.drill.command import run_drill, with_seed
    from pollard.services.drill.options import DrillOptions, Installation

    installation = None
    if any(given):
        installation = Installation(
            models=_address(manager, 8021),
            vision=_address(vision, 8011),
            inference=_address(inference, 8001),
        )
    victim = "models" if kill == Victim.MANAGER else (kill or Victim.RANDOM).value
    options = DrillOptions(
        swaps=swaps,
        load_percent=_percent(load),
        clients=clients,
        pause_seconds=pause,
        kills=kills or (20 if kill else 0),
        kill=victim,
        steps=_steps(steps),
        model_mb=model_mb,
        drain_seconds=drain,
        max_seconds=_seconds(max_time),
        installation=installation,
        model=model,
        revisions=_revisions(revisions),
        alias=alias,
        json_file=json_file,
    )
    raise typer.Exit(run_drill(with_seed(options, seed)))


@app.command()
def soak(
    duration: Annotated[
        str, typer.Option("--for", metavar="DURATION", help="How long the load lasts.")
    ] = "30min",
    load: Annotated[
        str,
        typer.Option(
            metavar="PERCENT",
            help="Requests, in percent of what the services can answer, which is measured first.",
        ),
    ] = "30%",
    clients: Annotated[int, typer.Option(min=1, max=256, help="Clients that ask.")] = 4,
    swap_every: Annotated[
        str, typer.Option(metavar="DURATION", help='From one swap to the next, or "never".')
    ] = "60s",
    sample_every: Annotated[
        str, typer.Option(metavar="DURATION", help="From one look at the services to the next.")
    ] = "10s",
    warm: Annotated[
        str,
        typer.Option(
            metavar="DURATION",
            help="What is seen before that, or in the first third, is not judged.",
        ),
    ] = "10min",
    max_slope: Annotated[
        float,
        typer.Option(
            metavar="PERCENT", min=0, help="Most that a service's memory may grow in 10 minutes."
        ),
    ] = 1.0,
    model_mb: Annotated[
        float, typer.Option(min=0.1, max=2000.0, help="Size of the drill's model, in MB.")
    ] = 10.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write figures and samples here.")
    ] = None,
) -> None:
    """Keep services under load for a long time, and see whether anything grows.

    Starts services of its own, keeps clients asking, swaps between two revisions, and looks at
    memory, file descriptors and threads of each service. Every answer is checked as in `swap`. The
    slope of the memory is Theil and Sen's: the median over all pairs of samples.

    Ends with exit code 1 when a request failed, or memory, files or threads kept growing. Ctrl-C
    ends it and prints what was seen.
    """
    from pollard.services.drill.soak import SoakOptions, run_soak

    percent = _percent(load)
    if not percent:
        raise typer.BadParameter("a soak sends its requests at an even rate; write 1% to 100%")
    options = SoakOptions(
        seconds=_seconds(duration),
        load_percent=percent,
        clients=clients,
        swap_seconds=0.0 if swap_every.strip() == "never" else _seconds(swap_every),
        sample_seconds=_seconds(sample_every),
        warm_seconds=_seconds(warm),
        max_slope_percent=max_slope,
        model_mb=model_mb,
        json_file=json_file,
    )
    raise typer.Exit(run_soak(options))


def _kinds(text: str) -> tuple[str, ...]:
    from pollard.services.drill.faults import KINDS

    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [kind for kind in found if kind not in KINDS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is no fault; there are {', '.join(KINDS)}")
    return found


@app.command()
def chaos(
    duration: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="DURATION",
            help="No fault begins after that, but each kind comes at least once.",
        ),
    ] = "10min",
    only: Annotated[
        str,
        typer.Option("--only", metavar="KINDS", help="What goes wrong, separated by commas."),
    ] = "kill,reset,delay,link,full-disk,slow-disk,clock",
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Decides what goes wrong and when; default: a new one, printed."),
    ] = None,
    load: Annotated[
        str,
        typer.Option(
            metavar="PERCENT",
            help="Requests, in percent of what the services can answer, which is measured first.",
        ),
    ] = "20%",
    clients: Annotated[int, typer.Option(min=1, max=256, help="Clients that ask.")] = 4,
    model_mb: Annotated[
        float, typer.Option(min=1.0, max=2000.0, help="Size of the drill's models, in MB.")
    ] = 5.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")
    ] = None,
) -> None:
    """Break things under load, one after the other, and check every answer.

    Starts services of its own behind proxies and keeps clients asking, while services are killed,
    connections reset or delayed, network cables pulled, disks full or slow, and clocks set. In the
    middle of every other fault the model is swapped. Clients send a request again that met
    UNAVAILABLE while something was broken; any other failure counts.

    What takes root or a program that is not there (iproute2, strace, faketime) is left out, and
    said. No disk of yours is filled: the services' data lie on a small file system in memory.

    Ends with exit code 1 when a request failed or was answered wrongly, or the services did not
    recover. Ctrl-C ends it and prints what was seen.
    """
    from pollard.services.drill.chaos import ChaosOptions, run_chaos, with_seed

    percent = _percent(load)
    if not percent:
        raise typer.BadParameter("chaos sends its requests at an even rate; write 1% to 100%")
    options = ChaosOptions(
        seconds=_seconds(duration),
        kinds=_kinds(only),
        load_percent=percent,
        clients=clients,
        seed=with_seed(seed),
        model_mb=model_mb,
        json_file=json_file,
    )
    raise typer.Exit(run_chaos(options))


def _address(given: str | None, port: int) -> str:
    address = given or f"127.0.0.1:{port}"
    host, _, number = address.rpartition(":")
    if not address.startswith("unix:") and not (host and number.isdigit()):
        raise typer.BadParameter(f"address {address!r} must be HOST:PORT, such as 127.0.0.1:8021")
    return address
