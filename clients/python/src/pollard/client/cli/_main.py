"""The root of the `pollard` command: its commands, those of other distributions, and its errors.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Mapping
from importlib import metadata
from typing import Annotated, Any

import typer
import typer.core

from pollard.client.cli._words import fail
from pollard.client.errors import PollardError, RequestFailed

# Where the commands come from that this distribution does not bring.
_DISTRIBUTIONS: Mapping[str, tuple[str, str]] = {
    "up": ("pollard-services[cpu]", "Start all services on this machine."),
    "serve": ("pollard-services[cpu]", "Start one service."),
    "doctor": ("pollard-services[cpu]", "Look whether this machine can run Pollard."),
    "health": ("pollard-services[cpu]", "Ask a server whether it takes requests."),
    "drill": ("pollard-services[cpu]", "Prove on this machine what Pollard promises."),
    "store": ("pollard-services[cpu]", "Back up what a manager keeps, and restore it."),
    "train": ("pollard-compression[cpu]", "Train a model of the zoo."),
    "eval": ("pollard-compression[cpu]", "Measure a model's accuracy."),
    "zoo": ("pollard-compression[cpu]", "List the networks that are built in."),
    "compress": ("pollard-compression[cpu]", "Prune and quantize a model into a bundle."),
    "profile": ("pollard-compression[cpu]", "Measure where a model's time goes."),
    "bundle": ("pollard-compression[cpu]", "Make a bundle of a model as it is."),
    "demo": ("pollard-compression[cpu]", "Train, compress, serve and swap under load."),
}


_LONGEST_SUMMARY = 1000


class _Commands(typer.core.TyperGroup):
    """Commands whose summaries take as many lines as they need, and are not cut."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [
            (name, command.get_short_help_str(_LONGEST_SUMMARY))
            for name, command in commands.items()
            if command is not None and not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def build_app(command: str = "") -> typer.Typer:
    """Put the command together out of everything that is installed.

    Args:
        command: The command that is going to run, where that is known. For one of another
            distribution the client's own are left out, which would take most of its start.
    """
    app = typer.Typer(
        name="pollard",
        cls=_Commands,
        help="Compress convolutional networks, serve them over gRPC, swap them under load.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback()
    def root(
        version: Annotated[
            bool,
            typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
        ] = False,
    ) -> None:
        """Compress convolutional networks, serve them over gRPC, swap them under load."""

    if command not in _DISTRIBUTIONS:
        _add_own(app)
    broken: dict[str, str] = {}
    for entry in metadata.entry_points(group="pollard.commands"):
        try:
            entry.load()(app)
        except ImportError as error:
            broken[entry.dist.name if entry.dist else entry.name] = str(error)
    _add_missing(app, broken)
    for group in app.registered_groups:
        group.cls = _Commands
    return app


def _add_own(app: typer.Typer) -> None:
    from pollard.client.cli import fleet, keys, models, predict, tokens, top

    app.add_typer(models.app, name="models")
    app.add_typer(keys.app, name="keys")
    app.add_typer(tokens.app, name="tokens")
    fleet.register(app)
    top.register(app)
    predict.register(app)


def main() -> None:
    """Run the command with the arguments of the process, and exit."""
    for stream in (sys.stdout, sys.stderr):
        # Arrows, and what people have written, are not in every locale's characters.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    try:
        app = build_app(arguments[0] if arguments else "")
        result = app(args=arguments, prog_name="pollard", standalone_mode=False)
    except typer.Abort:
        fail("interrupted")
        return 130
    except KeyboardInterrupt:
        fail("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of the output has gone, as `pollard … | head` does; nothing is wrong here.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "POLLARD_DEBUG" in os.environ:
            traceback.print_exc()
        elif not _is_expected(error):
            raise
        return _report(error)
    return result if isinstance(result, int) else 0


def _report(error: Exception) -> int:
    if hasattr(error, "format_message"):  # a usage error of typer's
        message = error.format_message()
        if not message:  # the help was printed instead
            return int(getattr(error, "exit_code", 2))
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            print(message, file=sys.stderr)
            return 2
        fail(message)
        context = getattr(error, "ctx", None)
        if context is not None:
            print(f"Try `{context.command_path} --help`.", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))
    fail(_message(error))
    return int(getattr(error, "exit_code", 1))


def _message(error: Exception) -> str:
    if isinstance(error, RequestFailed):
        from pollard.client.cli._hints import hint, of_connection

        name = error.code.name
        reason = f" ({error.reason})" if error.reason else ""
        if name == "UNAVAILABLE" and not error.reason:
            return (
                f"the server at {error.address} cannot be reached: {error.message}\n"
                f"{of_connection(error)}"
            )
        if name == "DEADLINE_EXCEEDED":
            return f"no answer from {error.address} in time; --timeout allows more"
        asked = ""
        if error.request_id and name in _FOR_OPERATORS:
            asked = f"\nThe server's log tells more, under request id {error.request_id}."
        return f"{error.message}{reason}{hint(error)}{asked}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        from pollard.client.environment import variable_of

        variable = variable_of(str(error.filename))
        return f"{variable and f'{variable}='}{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk that this command writes to is full ({error.strerror}); free some space and "
            "run it again"
        )
    package = _missing_package(error)
    if package:
        return (
            f"this command needs the package {package!r}, which is not installed here.\n"
            f"Install it, or the distribution that asks for it: {_WHO_NEEDS.get(package, package)}"
        )
    return str(error) or type(error).__name__


_FOR_OPERATORS = ("INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAVAILABLE")
"""Failures that whoever asked can do nothing about."""

_WHO_NEEDS = {
    "onnxruntime": "pollard-runtime[cpu] or pollard-runtime[gpu], never both",
    **dict.fromkeys(("onnx", "torch", "torch_pruning", "sklearn"), "pollard-compression"),
}
"""By module that may be missing: what brings it."""


def _missing_package(error: Exception) -> str:
    """Return the package whose absence is the error; empty if it is another error."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    package = error.name.split(".")[0]
    return "" if package == "pollard" else package


def _is_expected(error: Exception) -> bool:
    """Say whether an exception's message is meant for people.

    The distributions do not know each other's error trees, but every error class of Pollard's own
    has such a message.
    """
    return (
        hasattr(error, "format_message")
        or isinstance(error, PollardError | OSError)
        or bool(_missing_package(error))
        or type(error).__module__.split(".")[0] == "pollard"
    )


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pollard {metadata.version('pollard-client')}")
        raise typer.Exit


def _add_missing(app: typer.Typer, broken: Mapping[str, str]) -> None:
    """Add the commands of distributions that are not here, to say which to install."""
    present = {
        command.name or getattr(command.callback, "__name__", "").replace("_", "-")
        for command in app.registered_commands
    } | {group.name for group in app.registered_groups}
    for name, (distribution, help_text) in _DISTRIBUTIONS.items():
        if name not in present:
            _add_stand_in(app, name, distribution, help_text, broken)


def _add_stand_in(
    app: typer.Typer, name: str, distribution: str, help_text: str, broken: Mapping[str, str]
) -> None:
    plain_name = distribution.partition("[")[0]

    @app.command(
        name,
        # One sentence: of several, lists of commands show the first.
        help=f"{help_text.removesuffix('.')} (needs {plain_name}).",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,
    )
    def missing(context: typer.Context) -> Any:
        if plain_name in broken:
            fail(f"`pollard {name}` cannot start: {plain_name} is broken: {broken[plain_name]}")
        else:
            fail(
                f"`pollard {name}` needs the distribution {plain_name}, which is not installed.\n"
                f"Install it with: pip install '{distribution}'"
            )
        raise typer.Exit(1)
