"""`pollard serve`, `pollard up`, `pollard health`, `pollard drill` and `pollard store`.

This module is imported by every `pollard` command, so it imports nothing heavy by itself.
"""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated

import typer

from pollard.services.drill.cli import app as drill
from pollard.services.models.store_cli import app as store

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def register(app: typer.Typer) -> None:
    """Add the commands of this distribution to the root of the `pollard` command."""
    serve = typer.Typer(
        help="Start one service, and keep it in the foreground.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    for name, text in (
        ("inference", "Start the inference service: tensors in, tensors out."),
        ("preprocess", "Start the preprocess and vision service: images in, answers out."),
        ("models", "Start the model management service: registry, aliases, swaps."),
    ):
        _add_service(serve, name, text)
    app.add_typer(serve, name="serve")
    app.command()(up)
    app.command()(doctor)
    app.command()(health)
    app.add_typer(drill, name="drill")
    app.add_typer(store, name="store")


_TYPED = ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")
"""Where a shell that completes a command says what was typed so far: bash, and the others."""


def _add_service(app: typer.Typer, name: str, text: str) -> None:
    if any(f"serve {name} " in os.environ.get(variable, "") for variable in _TYPED):
        from pollard.services.up.serve import service_app

        (command,) = service_app(name).registered_commands
        command.name = name
        app.registered_commands.append(command)
        return

    # The options are the fields of the service's settings; reading those imports pydantic, so it
    # waits until the command runs.
    @app.command(name, help=text, context_settings=_PASS_ON)
    def service(context: typer.Context) -> None:
        from pollard.services.up.serve import serve_command

        raise typer.Exit(serve_command(name, context.args))


def up(
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar="POLLARD_DATA_DIR",
            help="Registry, bundles and caches. Default: $XDG_STATE_HOME/pollard, or "
            "~/.local/state/pollard.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port_base: Annotated[
        int,
        typer.Option(
            min=0,
            max=65000,
            help="Ports are this plus 1 (inference), 11 (preprocess) and 21 (models); 0 takes "
            "free ones.",
        ),
    ] = 8000,
    inference_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of inference; 0 takes a free one.")
    ] = None,
    preprocess_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of preprocess; 0 takes a free one.")
    ] = None,
    models_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of models; 0 takes a free one.")
    ] = None,
    replicas: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            help="Inference servers, for where one process cannot feed the processor or the GPU. "
            "Each next one listens 100 ports higher; images are spread over all of them.",
        ),
    ] = 1,
    balance: Annotated[
        bool,
        typer.Option(
            "--balance",
            help="With --replicas: Envoy listens on the inference port and spreads the requests "
            "of all clients over the replicas, which move 100 ports up. Needs "
            "pollard-services[envoy].",
        ),
    ] = False,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Allow an address that is not loopback though anybody may call, or nothing is "
            "encrypted.",
        ),
    ] = False,
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens",
            help="Let only those in who show a token, and only to what its role allows. The first "
            "start makes one for you and prints it.",
        ),
    ] = False,
    tls_certificate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PEM file with the certificate chain that all three services show; read again "
            "when it changes. Needs --tls-key and --tls-ca.",
        ),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file with the certificate's key.")
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PEM file with the authority of that certificate: the services trust each other "
            "by it.",
        ),
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PEM file with the authorities of clients: whoever connects must show a "
            "certificate of one of them, the services too.",
        ),
    ] = None,
    tls_name: Annotated[
        str,
        typer.Option(
            help="Name in the certificate, if it does not hold the address of this machine."
        ),
    ] = "",
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TOML file with the services' settings."),
    ] = None,
    ready_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write addresses and pids here, as JSON, once all are healthy."
        ),
    ] = None,
    start_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="How long all may take to be healthy.")
    ] = 60.0,
    grace: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="How long requests in flight may take to end."),
    ] = 10.0,
    hang_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="How long a service may leave health checks without an answer before it is killed "
            "and started again; 0 never does that.",
        ),
    ] = 20.0,
    stop_with_parent: Annotated[
        bool,
        typer.Option(
            "--stop-with-parent", help="Stop when the process that started this one ends (Linux)."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only write warnings and errors.")] = False,
) -> None:
    """Start the three services on this machine, and keep them running.

    Ctrl-C or SIGTERM stops them cleanly. A service that dies or hangs is started again. Kept data
    lies in --data-dir; the same directory gives the same models again.
    """
    from pollard.services.common.tls_files import TlsFiles
    from pollard.services.up.command import run_up
    from pollard.services.up.plan import UpOptions

    if stop_with_parent:
        import os
        import signal

        from pollard.services.up.child import signal_when_parent_ends

        signal_when_parent_ends(os.getppid(), signal.SIGTERM)

    options = UpOptions(
        data_dir=data_dir,
        host=host,
        port_base=port_base,
        inference_port=inference_port,
        preprocess_port=preprocess_port,
        models_port=models_port,
        replicas=replicas,
        balance=balance,
        insecure=insecure,
        tokens=tokens,
        tls=TlsFiles(tls_certificate, tls_key, tls_client_ca, tls_ca, tls_name),
        config=config,
        ready_file=ready_file,
        start_timeout_seconds=start_timeout,
        grace_seconds=grace,
        hang_seconds=hang_timeout,
        quiet=quiet,
    )
    raise typer.Exit(run_up(options))


class _Provider(enum.StrEnum):
    """Where models are to run."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def doctor(
    provider: Annotated[
        _Provider, typer.Option(help="Where models are to run; cuda makes a GPU necessary.")
    ] = _Provider.AUTO,
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", envvar="POLLARD_DATA_DIR", help="As of pollard up."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address that the services would listen on.")] = (
        "127.0.0.1"
    ),
    port_base: Annotated[int, typer.Option(help="As of pollard up.", min=1, max=65500)] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look whether this machine can run Pollard, and say what it lacks; changes nothing.

    Exits with 1 if something does not run.
    """
    from pollard.services.doctor.command import run

    raise typer.Exit(
        run(
            provider=provider.value,
            data_dir=data_dir,
            host=host,
            port_base=port_base,
            as_json=as_json,
        )
    )


def health(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Which server to ask.")],
    service: Annotated[
        str,
        typer.Option(
            help="Full name of one of its services; grpc.health.v1.Health asks only whether it "
            "answers at all."
        ),
    ] = "",
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="How long it may take.")
    ] = 5.0,
) -> None:
    """Ask a server whether it takes requests; exit with 0 if it does.

    For health checks of containers and service managers. TLS comes from the environment, as for
    every command: POLLARD_TLS_CA, and POLLARD_TLS_CERTIFICATE with POLLARD_TLS_KEY.
    """
    from pollard.services.common.probe import probe

    try:
        healthy, words = probe(address, service=service, timeout_seconds=timeout)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    print(words)
    raise typer.Exit(0 if healthy else 1)
