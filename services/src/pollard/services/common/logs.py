"""Logs: one line an event, to standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Literal

import structlog

Format = Literal["console", "json"]

_LEVELS = ("debug", "info", "warning", "error", "critical")

_enabled: frozenset[str] = frozenset(_LEVELS)


def enabled_levels() -> frozenset[str]:
    """Return the levels that are written."""
    return _enabled


def set_enabled_levels(levels: Iterable[str]) -> None:
    """Write these levels from now on, in loggers that exist too. "critical" always is."""
    global _enabled
    _enabled = frozenset((*levels, "critical"))


def _drop_disabled(
    _: structlog.types.WrappedLogger, method: str, event: structlog.types.EventDict
) -> structlog.types.EventDict:
    if {"warn": "warning", "exception": "error"}.get(method, method) not in _enabled:
        raise structlog.DropEvent
    return event


def configure_logging(service: str, *, level: str = "info", form: Format = "console") -> None:
    """Set up structlog for a process.

    Args:
        service: Name that every line carries.
        level: Lowest level that is written.
        form: ``console`` for people, ``json`` for collectors.
    """
    set_enabled_levels(_LEVELS[_LEVELS.index(level) :])
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    processors: list[structlog.types.Processor] = [
        _drop_disabled,
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if form == "json":
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        # Not the level itself: a logger that was used once keeps its class, and the level may be
        # changed while the service runs.
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
