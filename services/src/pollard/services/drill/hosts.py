"""Hosts of one machine's own: network namespaces on a bridge, with a limit on their processors.

Each has an address, processes that can be killed together, and a cable that can be pulled. It takes
root (CAP_NET_ADMIN) and iproute2. Programs of this machine itself reach them at the bridge. All
that is made carries the id of the process that made it in its name: what a process left that was
killed, the next one clears away.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

_CGROUPS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
_PREFIX = "plf"
"""Of all names; the id of the process that made it follows."""

_PERIOD_MICROSECONDS = 10_000
"""Short, so that a host that has used its share waits for milliseconds only."""


def why_not() -> str:
    """Return why hosts cannot be made here; empty if they can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed: apt-get install iproute2"
    name = f"{_PREFIX}{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"network namespaces need root and CAP_NET_ADMIN: {done.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


class Host:
    """One host: a namespace with an address."""

    def __init__(self, network: Network, name: str, number: int, cores: float) -> None:
        self.name = name
        self.address = f"{network.prefix}.{10 + number}"
        self._network = network
        self._namespace = f"{network.name}-{self.name}"
        self._cable = f"{network.name}-{number}"
        self._inner = f"{network.name}i{number}"
        self._cores = cores
        self._group: Path | None = None

    def create(self) -> None:
        """Make it; `close` takes away what there is of it."""
        network, inner = self._network, self._inner
        if self._cores:
            self._group = _group(self._namespace)
        _ip("netns", "add", self._namespace)
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", inner)
        _ip("link", "set", inner, "netns", self._namespace)
        _ip("-n", self._namespace, "link", "set", inner, "name", "eth0")
        _ip("-n", self._namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self._namespace, "link", "set", "eth0", "up")
        _ip("-n", self._namespace, "link", "set", "lo", "up")
        _ip("link", "set", self._cable, "master", network.name)
        _ip("link", "set", self._cable, "up")

    @property
    def entering(self) -> list[str]:
        """What a command line begins with so that its program runs there."""
        return ["nsenter", f"--net=/run/netns/{self._namespace}"]

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program there; what it says is added to `log`."""
        inside = [*self.entering, *command]
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

    def limit(self) -> None:
        """Let its programs use no more than its share of processors from now on."""
        if self._group is None:
            return
        quota = round(self._cores * _PERIOD_MICROSECONDS)
        if (self._group / "cpu.cfs_quota_us").exists():
            (self._group / "cpu.cfs_period_us").write_text(str(_PERIOD_MICROSECONDS))
            (self._group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (self._group / "cpu.max").write_text(f"{quota} {_PERIOD_MICROSECONDS}")

    def run(self, *command: str) -> str:
        """Run a program there to its end; return what it prints, without spaces around it.

        Raises:
            RuntimeError: it failed; the message has its words.
        """
        done = subprocess.run(
            [*self.entering, *command],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} on {self.name}: {done.stderr.strip()}")
        return done.stdout.strip()

    def kill(self) -> None:
        """Kill whatever runs there, at once; the host itself goes on and refuses connections."""
        _kill(self._namespace)

    def cut(self) -> None:
        """Pull the cable: nothing comes or goes any more, and nobody is told."""
        _ip("link", "set", self._cable, "down")

    def plug(self) -> None:
        """Put the cable back."""
        _ip("link", "set", self._cable, "up")

    def close(self) -> None:
        """Kill what runs there, and take the host away."""
        _end(self._namespace)


class Network:
    """A bridge and the hosts on it. Leave the context, and all of it is gone."""

    def __init__(self) -> None:
        sweep()
        number = os.getpid()
        self.name = f"{_PREFIX}{number}"
        self.prefix = _free_prefix(number)
        self.address = f"{self.prefix}.1"
        """This machine's own address in it."""
        self.hosts: list[Host] = []
        _ip("link", "add", self.name, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")

    def add(self, name: str, *, cores: float = 0.0) -> Host:
        """Add a host.

        Args:
            name: What it is called.
            cores: Processors that all of its programs together may use once `limit` is called, so
                that they start in reasonable time; 0 for no limit.
        """
        # Listed before it is whole: what was made of it is taken away all the same.
        made = Host(self, name, len(self.hosts) + 1, cores)
        self.hosts.append(made)
        made.create()
        return made

    def close(self) -> None:
        """Take everything away."""
        for host in self.hosts:
            host.close()
        _clear(self.name)

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def sweep() -> None:
    """Take away what processes left that are no more."""
    for owner in _owners():
        if not Path(f"/proc/{owner}").exists():
            _clear(f"{_PREFIX}{owner}")


def _owners() -> set[int]:
    found = _names("netns", "list") | _names("-o", "link", "show", "type", "bridge")
    for root in _CGROUPS:
        found |= {path.name for path in root.glob(f"{_PREFIX}*")}
    matches = (re.match(rf"{_PREFIX}(\d+)(-|$)", name) for name in found)
    return {int(match[1]) for match in matches if match}


def _names(*words: str) -> set[str]:
    """Return the names in what `ip` lists: the first word of a line, or that after a number."""
    listed = subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
    lines = (line.split() for line in listed.splitlines())
    return {(words[1] if words[0].endswith(":") else words[0]).strip(":") for words in lines}


def _clear(network: str) -> None:
    """Take away a network with all of its hosts, as far as there is anything of them."""
    for namespace in sorted(_names("netns", "list")):
        if namespace.startswith(f"{network}-"):
            _end(namespace)
    for root in _CGROUPS:
        for group in root.glob(f"{network}-*"):
            with contextlib.suppress(OSError):
                group.rmdir()
    if network in _names("-o", "link", "show", "type", "bridge"):
        _ip("link", "del", network)


def _end(namespace: str) -> None:
    if namespace not in _names("netns", "list"):
        return
    _kill(namespace)
    _ip("netns", "del", namespace)
    for root in _CGROUPS:
        with contextlib.suppress(OSError):
            (root / namespace).rmdir()


def _kill(namespace: str) -> None:
    until = time.monotonic() + 20
    while pids := _pids(namespace):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > until:
            raise RuntimeError(f"{pids} of {namespace} do not end")
        time.sleep(0.02)


def _pids(namespace: str) -> list[int]:
    done = subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True
    )
    # The dead whose parent has not looked yet are none.
    return [int(word) for word in done.stdout.split() if not _is_zombie(int(word))]


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


def _group(name: str) -> Path:
    """Make a control group."""
    root = next((each for each in _CGROUPS if (each / "cgroup.procs").exists()), None)
    if root is None:
        raise RuntimeError("there are no control groups here to limit processors with")
    made = root / name
    made.mkdir()
    return made


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
