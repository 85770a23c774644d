"""What systemd is told."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from pollard.services.common.lifecycle import _run
from pollard.services.common.systemd import notify


class Quiet:
    async def start(self) -> None:
        pass

    async def stop(self, grace_seconds: float) -> None:
        pass


def listener(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind(f"\0{path[1:]}" if path.startswith("@") else path)
    made.settimeout(20)
    return made


async def test_a_service_says_when_it_is_ready_and_when_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "notify")
    with listener(path) as systemd:
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        running = asyncio.create_task(_run(Quiet, 1.0))
        assert await asyncio.to_thread(systemd.recv, 100) == b"READY=1"
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.to_thread(systemd.recv, 100) == b"STOPPING=1"
        assert await running == 0


def test_abstract_sockets_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"@pollard-test-{os.getpid()}"
    with listener(name) as systemd:
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert notify("READY=1")
        assert systemd.recv(100) == b"READY=1"


def test_without_systemd_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not notify("READY=1")
