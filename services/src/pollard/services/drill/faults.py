"""What chaos consists of: each fault strikes, is held for a while, and is healed."""

from __future__ import annotations

import abc
import random
from collections.abc import Mapping
from dataclasses import dataclass

from pollard.services.drill.clocks import Clock
from pollard.services.drill.disks import FileLimit, SlowDisk, SmallDisk
from pollard.services.drill.hosts import Host
from pollard.services.drill.options import SERVICES
from pollard.services.drill.processes import Services
from pollard.services.drill.proxy import TcpProxy
from pollard.services.up.plan import INFERENCE, MODELS

KILL, RESET, DELAY, LINK, FULL_DISK, SLOW_DISK, CLOCK = (
    "kill",
    "reset",
    "delay",
    "link",
    "full-disk",
    "slow-disk",
    "clock",
)

KINDS = (KILL, RESET, DELAY, LINK, FULL_DISK, SLOW_DISK, CLOCK)
"""All that there are."""

_DELAYS_SECONDS = (0.01, 0.05, 0.2)
_DISK_SECONDS = (0.005, 0.02, 0.1)
_STEPS_SECONDS = (-86_400, -3600, -60, 60, 3600, 86_400)


@dataclass(frozen=True)
class Stage:
    """What faults act on."""

    services: Services
    proxies: Mapping[str, TcpProxy]
    """Before each service."""
    hosts: Mapping[str, Host]
    """Of each service; empty where there are no network namespaces."""
    disk: SmallDisk
    clock: Clock


class Fault(abc.ABC):
    """One thing that goes wrong."""

    held = True
    """Whether it lasts; what does not is over when it has struck."""

    def __init__(self, stage: Stage) -> None:
        """Take what it acts on."""
        self.stage = stage

    @abc.abstractmethod
    async def strike(self, chance: random.Random) -> str:
        """Begin; return in words what was done."""

    async def heal(self) -> None:  # noqa: B027 - of what does not last, nothing is left to end
        """End; also where it struck in part only."""


class Kill(Fault):
    """SIGKILL to a service, which is started again as a supervisor would."""

    held = False

    async def strike(self, chance: random.Random) -> str:
        """Kill."""
        name = chance.choice(SERVICES)
        self.stage.services.kill(name)
        return f"{name} killed"

    async def heal(self) -> None:
        """Wait until it has been started again."""
        await self.stage.services.all_healthy()


class Reset(Fault):
    """All connections to a service are reset, several times in a row."""

    held = False

    async def strike(self, chance: random.Random) -> str:
        """Reset."""
        name = chance.choice(SERVICES)
        count = self.stage.proxies[name].reset()
        return f"{count} connections to {name} reset"


class Delay(Fault):
    """What goes to a service and comes from it is held back."""

    async def strike(self, chance: random.Random) -> str:
        """Hold back."""
        name, seconds = chance.choice(SERVICES), chance.choice(_DELAYS_SECONDS)
        self.stage.proxies[name].delay_seconds = seconds
        return f"{seconds * 1e3:.0f} ms each way to {name}"

    async def heal(self) -> None:
        """Let everything pass again."""
        for proxy in self.stage.proxies.values():
            proxy.delay_seconds = 0.0


class Link(Fault):
    """The cable of a service's host is pulled: nothing comes or goes, and nobody is told."""

    async def strike(self, chance: random.Random) -> str:
        """Pull."""
        name = chance.choice(SERVICES)
        self.stage.hosts[name].cut()
        return f"cable of {name} pulled"

    async def heal(self) -> None:
        """Put all cables back."""
        for host in self.stage.hosts.values():
            host.plug()


class FullDisk(Fault):
    """There is no room left for the services' data."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._limit = FileLimit()

    async def strike(self, chance: random.Random) -> str:
        """Fill it, or let no file grow."""
        disk = self.stage.disk
        if disk.mounted:
            return f"disk filled with {disk.fill() / 1e6:.0f} MB"
        self._limit.set(self.stage.services.pid(MODELS))
        return f"no file of {MODELS} may grow"

    async def heal(self) -> None:
        """Make room."""
        self._limit.lift()
        if self.stage.disk.mounted:
            self.stage.disk.empty()


class Slow(Fault):
    """The disk of a service takes its time."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._disk = SlowDisk()

    async def strike(self, chance: random.Random) -> str:
        """Slow it down."""
        name, seconds = chance.choice((MODELS, INFERENCE)), chance.choice(_DISK_SECONDS)
        self._disk.begin(self.stage.services.pid(name), seconds)
        return f"{seconds * 1e3:.0f} ms for each access of {name} to its disk"

    async def heal(self) -> None:
        """Let it be as quick as it is."""
        await self._disk.end()


class ClockStep(Fault):
    """The time of day of all services jumps."""

    async def strike(self, chance: random.Random) -> str:
        """Jump."""
        seconds = chance.choice(_STEPS_SECONDS)
        self.stage.clock.set(seconds)
        return f"clocks set by {seconds:+d} s"

    async def heal(self) -> None:
        """Jump back."""
        self.stage.clock.set(0)


FAULTS: Mapping[str, type[Fault]] = {
    KILL: Kill,
    RESET: Reset,
    DELAY: Delay,
    LINK: Link,
    FULL_DISK: FullDisk,
    SLOW_DISK: Slow,
    CLOCK: ClockStep,
}
