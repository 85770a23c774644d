"""A Ray cluster: how it is joined, and what is refused there.

Ray (Moritz et al., 2018) is an engine that exists already; what runs on it here are trials of a
search (:mod:`pollard.compress.cluster_trials`) and processes of a training
(:mod:`pollard.compress.cluster_training`). It is optional, and imported only when it is asked for.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from pollard.compress.errors import CompressionError, UsageInvalid
from pollard.runtime.machine import Machine

LOCAL = "local"
"""In place of an address: a cluster of this machine alone, for as long as it is needed."""


def load_ray() -> ModuleType:
    """Import Ray.

    Raises:
        UsageInvalid: it is not installed.
    """
    # Nobody else is to hear what is run here.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers do as they are told by whoever starts the cluster, not by Ray.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UsageInvalid(
            "--ray needs Ray: pip install 'pollard-compression[ray]', here and on every node"
        ) from None
    module: ModuleType = ray
    return module


@contextmanager
def joined(address: str) -> Iterator[ModuleType]:
    """Join the cluster at ``address`` and leave it afterwards; gives Ray.

    Args:
        address: HOST:PORT of its head, "ray://HOST:PORT", "auto" for the one that this machine
            belongs to, or "local".

    Raises:
        UsageInvalid: Ray is not installed.
        CompressionError: no cluster answers.
    """
    ray = load_ray()
    if ray.is_initialized():
        # In a program that uses Ray already.
        yield ray
        return
    how: dict[str, object] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with _own_signals():
            if address == LOCAL:
                ray.init(include_dashboard=False, **how)
            else:
                _knock(address)
                ray.init(address, **how)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        why = " ".join(str(error).split())[:300]
        raise CompressionError(
            f"no Ray cluster answers at {address!r} ({why}); `ray start --head` begins one, "
            "`ray status` tells of one that this machine belongs to, and --ray local needs none"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError where nothing listens: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what SIGTERM does: Ray would have it end the process in its own way."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def cores(ray: ModuleType) -> int:
    """Return how many processor cores the cluster has now, at least one."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def software() -> str:
    """Return the version that nodes must have, too."""
    try:
        return version("pollard-compression")
    except PackageNotFoundError:
        return "0+unknown"


def measures_as(machine: Machine) -> tuple[str, tuple[str, ...], str]:
    """Return what latencies depend on: processor, vector instructions, version of the engine."""
    features = tuple(sorted(f for f in machine.cpu_features if f.startswith("avx")))
    return machine.processor, features, machine.onnxruntime
