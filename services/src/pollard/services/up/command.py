"""What `pollard up` shows and writes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pollard.services.common.log_stream import stream_of, take_over
from pollard.services.up.plan import (
    BALANCER,
    INFERENCE,
    MODELS,
    PREPROCESS,
    UpOptions,
    first_tokens,
    make_plan,
)
from pollard.services.up.supervisor import Child, Supervisor, install_signals

# ANSI colours: cyan, green, magenta, blue.
_COLORS = {INFERENCE: "36", PREPROCESS: "32", MODELS: "35", BALANCER: "34"}
_WHAT = {
    INFERENCE: "tensors in, tensors out",
    PREPROCESS: "images in, answers out",
    MODELS: "registry, aliases, swaps",
    BALANCER: "tensors in, tensors out: spreads requests over the inference servers",
}


def run_up(options: UpOptions) -> int:
    """Run `pollard up` until it is stopped; return the exit code.

    Raises:
        StartupError: The services could not be started or kept running. Nothing is left running.
    """
    take_over()
    log = stream_of(sys.stderr)
    if log is not None:
        log.describe = lambda lost, why: f"{_tag('up')}{lost} lines of the log were lost: {why}"
    return asyncio.run(_run(options))


async def _run(options: UpOptions) -> int:
    data_dir, plans = make_plan(options)
    first = True
    admin = first_tokens(data_dir) / "admin.token" if options.tokens else None
    known_before = admin is not None and admin.exists()

    def notice(line: str) -> None:
        _write_log("up", line)

    def write_line(name: str, line: str) -> None:
        if options.quiet and not any(word in line for word in ("warning", "error", "critical")):
            return
        _write_log(name, line)

    def changed() -> None:
        nonlocal first
        if options.ready_file is not None:
            write_ready_file(options.ready_file, data_dir, supervisor.children)
        if first and not options.quiet:
            _show(data_dir, supervisor.children)
            if admin is not None:
                _show_admin(admin, known_before)
        first = False

    supervisor = Supervisor(
        plans,
        notice=notice,
        write_line=write_line,
        changed=changed,
        start_timeout_seconds=options.start_timeout_seconds,
        grace_seconds=options.grace_seconds,
        hang_seconds=options.hang_seconds,
        tls=options.tls,
    )
    install_signals(supervisor)
    if options.ready_file is not None:
        # One left by an earlier run would name processes that are gone.
        options.ready_file.unlink(missing_ok=True)
    try:
        code = await supervisor.run()
    finally:
        if options.ready_file is not None:
            options.ready_file.unlink(missing_ok=True)
    if not options.quiet:
        notice("all services have stopped")
    return code


def _write_log(name: str, line: str) -> None:
    """Write a line to standard error, with who said it."""
    # Plain writes, not rich: thousands of lines a second may come through here.
    sys.stderr.write(f"{_tag(name)}{line}\n")


def _tag(name: str) -> str:
    tag = f"{f'[{name}]':<13}"
    if sys.stderr.isatty():
        return f"\x1b[{_COLORS.get(name.partition('-')[0], '1')}m{tag}\x1b[0m"
    return tag


def write_ready_file(path: Path, data_dir: Path, children: Mapping[str, Child]) -> None:
    """Write addresses and pids as JSON, whole or not at all."""
    content = {
        "pid": os.getpid(),
        "data_dir": str(data_dir),
        "services": {
            name: {
                "address": child.plan.address,
                "port": child.plan.port,
                "http_port": child.plan.http_port,
                "pid": child.pid,
                "restarts": child.restarts,
            }
            for name, child in children.items()
        },
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    beside.replace(path)


def _show_admin(file: Path, known_before: bool) -> None:
    """Say what the operator calls with, at the first start with the token itself."""
    if known_before or not file.exists():
        sys.stdout.write(f"Only who shows a token gets in; the first admin's is in {file}\n")
        return
    sys.stdout.write(
        "Only who shows a token gets in. The first admin's, which is shown this once:\n"
        f"  export POLLARD_TOKEN={file.read_text().strip()}\n"
        f"It is also in {file}; remove that file when you have another.\n"
        "Make tokens for others: pollard tokens create NAME --role predictor\n",
    )


def _show(data_dir: Path, children: Mapping[str, Child]) -> None:
    text = io.StringIO()
    out = Console(file=text, highlight=False, width=120)
    table = Table("SERVICE", "ADDRESS", "HTTP", "PID", "WHAT", box=None)
    for service in (BALANCER, INFERENCE, PREPROCESS, MODELS):
        for name, child in children.items():
            if child.plan.service == service:
                http = str(child.plan.http_port or "")
                table.add_row(name, child.plan.address, http, str(child.pid), _WHAT[service])
    out.print(table)
    out.print(f"Data in {data_dir}", markup=False, soft_wrap=True)
    out.print(f"Stop with Ctrl-C, or: kill {os.getpid()}", markup=False)
    if children[MODELS].plan.port != 8021:
        out.print(
            f"For the pollard command: export POLLARD_MODELS_ADDRESS="
            f"{children[MODELS].plan.address} POLLARD_VISION_ADDRESS="
            f"{children[PREPROCESS].plan.address}",
            markup=False,
            soft_wrap=True,
        )
    sys.stdout.write(text.getvalue())
