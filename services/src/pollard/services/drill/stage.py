"""Where chaos takes place: services of the drill's own, and what can be done to them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pollard.services.drill import clocks, hosts
from pollard.services.drill.clocks import Clock
from pollard.services.drill.disks import SlowDisk, SmallDisk
from pollard.services.drill.errors import DrillFailed
from pollard.services.drill.faults import CLOCK, FULL_DISK, LINK, SLOW_DISK, Stage
from pollard.services.drill.hosts import Host, Network
from pollard.services.drill.options import SERVICES, Installation
from pollard.services.drill.processes import Services, started
from pollard.services.drill.proxy import TcpProxy
from pollard.services.up.plan import INFERENCE, MODELS, PREPROCESS, ServicePlan

_LOOPBACK = "127.0.0.1"

_WHY_NOT: Mapping[str, Callable[[], str]] = {
    LINK: hosts.why_not,
    SLOW_DISK: SlowDisk.why_not,
    CLOCK: clocks.why_not,
}


def left_out(kinds: Sequence[str]) -> dict[str, str]:
    """Return which of the kinds cannot be had on this machine, and why."""
    found = {kind: _WHY_NOT[kind]() for kind in kinds if kind in _WHY_NOT}
    return {kind: why for kind, why in found.items() if why}


@contextlib.asynccontextmanager
async def staged(
    directory: Path,
    kinds: Sequence[str],
    *,
    model_mb: float,
    drain_seconds: float,
    said: Callable[[str], None],
) -> AsyncIterator[tuple[Stage, Installation]]:
    """Start the services with a proxy before each; take everything away whatever happens.

    Args:
        directory: For data and logs.
        kinds: What will be done to them, none of those in `left_out`.
        model_mb: Size of their models.
        drain_seconds: How long a revision that is no longer served stays loaded.
        said: Told what there is.

    Raises:
        DrillFailed: they do not start.
    """
    async with contextlib.AsyncExitStack() as stack:
        disk = SmallDisk(directory / "data", model_mb)
        stack.callback(disk.unmount)
        if FULL_DISK in kinds:
            why = disk.mount()
            said(
                f"The disk is made full by a limit on files of {MODELS} only: {why}"
                if why
                else "The services' data lie on a small file system in memory, which is made full."
            )
        clock = Clock(directory / "clock")
        services = Services(
            directory,
            drain_seconds=drain_seconds,
            environment=clock.environment() if CLOCK in kinds else None,
        )
        stack.callback(lambda: clocks.sweep(services.pids))
        own: dict[str, Host] = {}
        outside = _LOOPBACK
        if LINK in kinds:
            try:
                network = stack.enter_context(Network())
                own = {name: network.add(name) for name in SERVICES}
            except RuntimeError as error:
                raise DrillFailed(
                    f"hosts for the services cannot be made: {error}; leave out {LINK}"
                ) from error
            outside = network.address
        proxies: dict[str, TcpProxy] = {}
        for plan in services.plans:
            host = own[plan.name].address if own else _LOOPBACK
            proxies[plan.name] = proxy = TcpProxy(outside, host, plan.port)
            await proxy.start()
            stack.push_async_callback(proxy.close)
        for plan in services.plans:
            before = own[plan.name].entering if own else ()
            services.change(_through(plan, proxies, own.get(plan.name)), before)
        await stack.enter_async_context(started(services, said=said))
        yield (
            Stage(services, proxies, own, disk, clock),
            Installation(
                models=proxies[MODELS].address,
                vision=proxies[PREPROCESS].address,
                inference=proxies[INFERENCE].address,
            ),
        )


def _through(plan: ServicePlan, proxies: Mapping[str, TcpProxy], host: Host | None) -> ServicePlan:
    """Let a service reach the manager, and be reached by others, through the proxies."""
    arguments = list(plan.arguments)
    if "--manager" in arguments:
        arguments[arguments.index("--manager") + 1] = proxies[MODELS].address
    arguments += ["--advertise", proxies[plan.name].address]
    if host is None:
        return replace(plan, arguments=tuple(arguments))
    arguments[arguments.index("--host") + 1] = host.address
    # The network ends at this machine.
    arguments.append("--insecure")
    return replace(plan, host=host.address, arguments=tuple(arguments))
