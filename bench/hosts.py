"""Hosts of one machine's own: network namespaces on a bridge, with a limit on their processors.

Each has an address, processes that can be killed together, and a cable that can be pulled. It takes
root (CAP_NET_ADMIN) and iproute2. Programs of this machine itself reach them at the bridge.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

_CGROUPS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
_PERIOD_MICROSECONDS = 10_000
"""Short, so that a host that has used its share waits for milliseconds only."""


def why_not() -> str:
    """Return why hosts cannot be made here; empty if they can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed: apt-get install iproute2"
    name = f"plprobe{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"network namespaces need root and CAP_NET_ADMIN: {done.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


class Host:
    """One host: a namespace with an address."""

    def __init__(self, network: Network, number: int, cores: float) -> None:
        self.name = f"h{number}"
        self.address = f"{network.prefix}.{10 + number}"
        self._network = network
        self._namespace = f"{network.name}-{self.name}"
        self._cable = f"{network.name}-{number}"
        self._group = _group(self._namespace, cores) if cores else None
        inner = f"{network.name}i{number}"
        _ip("netns", "add", self._namespace)
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", inner)
        _ip("link", "set", inner, "netns", self._namespace)
        _ip("-n", self._namespace, "link", "set", inner, "name", "eth0")
        _ip("-n", self._namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self._namespace, "link", "set", "eth0", "up")
        _ip("-n", self._namespace, "link", "set", "lo", "up")
        _ip("link", "set", self._cable, "master", network.name)
        _ip("link", "set", self._cable, "up")

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program there; what it says is added to `log`."""
        inside = ["nsenter", f"--net=/run/netns/{self._namespace}", *command]
        if self._group is not None:
            joining = f'echo $$ > {self._group / "cgroup.procs"} && exec "$@"'
            inside = ["sh", "-c", joining, "sh", *inside]
        with log.open("ab") as file:
            return subprocess.Popen(
                inside,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill whatever runs there, at once, as a power cut does."""
        until = time.monotonic() + 20
        while pids := self._pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > until:
                raise RuntimeError(f"{pids} of {self.name} do not end")
            time.sleep(0.02)

    def cut(self) -> None:
        """Pull the cable: nothing comes or goes any more, and nobody is told."""
        _ip("link", "set", self._cable, "down")

    def plug(self) -> None:
        """Put the cable back."""
        _ip("link", "set", self._cable, "up")

    def close(self) -> None:
        """Kill what runs there, and take the host away."""
        self.kill()
        _ip("netns", "del", self._namespace)
        if self._group is not None:
            with contextlib.suppress(OSError):
                self._group.rmdir()

    def _pids(self) -> list[int]:
        done = subprocess.run(
            ["ip", "netns", "pids", self._namespace], capture_output=True, text=True, check=True
        )
        # The dead whose parent has not looked yet are none.
        return [int(word) for word in done.stdout.split() if not _is_zombie(int(word))]


class Network:
    """A bridge and the hosts on it. Leave the context, and all of it is gone."""

    def __init__(self) -> None:
        number = os.getpid() % 1000
        self.name = f"pl{number}"
        self.prefix = _free_prefix(number)
        self.address = f"{self.prefix}.1"
        """This machine's own address in it."""
        self.hosts: list[Host] = []
        _ip("link", "add", self.name, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")

    def add(self, *, cores: float = 0.0) -> Host:
        """Add a host.

        Args:
            cores: Processors that all of its programs together may use; 0 for no limit.
        """
        made = Host(self, len(self.hosts) + 1, cores)
        self.hosts.append(made)
        return made

    def close(self) -> None:
        """Take everything away."""
        for host in self.hosts:
            host.close()
        _ip("link", "del", self.name)

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _free_prefix(number: int) -> str:
    used = subprocess.run(
        ["ip", "-o", "-4", "addr"], capture_output=True, text=True, check=True
    ).stdout
    for step in range(250):
        prefix = f"10.{200 + number % 50}.{(number + step) % 250}"
        if f" {prefix}." not in used:
            return prefix
    raise RuntimeError("there is no free network below 10.200.0.0")


def _group(name: str, cores: float) -> Path:
    """Make a control group that may use so many processors."""
    quota = round(cores * _PERIOD_MICROSECONDS)
    root = next((each for each in _CGROUPS if (each / "cgroup.procs").exists()), None)
    if root is None:
        raise RuntimeError("there are no control groups here to limit processors with")
    made = root / name
    made.mkdir()
    if (made / "cpu.cfs_quota_us").exists():
        (made / "cpu.cfs_period_us").write_text(str(_PERIOD_MICROSECONDS))
        (made / "cpu.cfs_quota_us").write_text(str(quota))
    else:
        (made / "cpu.max").write_text(f"{quota} {_PERIOD_MICROSECONDS}")
    return made


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
