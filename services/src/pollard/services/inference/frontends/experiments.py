"""What grpcio's core is told by the environment; it reads that when grpcio is imported."""

from __future__ import annotations

import os
import sys

EXPERIMENTS = "GRPC_EXPERIMENTS"

THREADLESS = "-event_engine_listener,-event_engine_client"
"""Value of GRPC_EXPERIMENTS with which the core reads and writes on the thread that polls, not on
threads of its own that wake it: three quarters of the processor time of a small request, a fifth of
the context switches."""


def choose_threadless() -> None:
    """Set GRPC_EXPERIMENTS, unless grpcio has read it already. Whoever has set it has decided."""
    if "grpc" not in sys.modules:
        os.environ.setdefault(EXPERIMENTS, THREADLESS)


def begin_anew() -> None:
    """Start this program again with GRPC_EXPERIMENTS set to `THREADLESS`, if it is not set.

    It comes back from nowhere: the process stays the same and begins at its command line.
    """
    if EXPERIMENTS not in os.environ:
        os.environ[EXPERIMENTS] = THREADLESS
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - itself
