"""Logs: one line an event, to standard error."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Literal

import structlog

from pollard.services.common.log_stream import stream_of
from pollard.services.common.telemetry.record import current_call

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


def _add_call(
    _: structlog.types.WrappedLogger, __: str, event: structlog.types.EventDict
) -> structlog.types.EventDict:
    call = current_call()
    if call is not None:
        event.setdefault("request_id", call.request_id)
        if call.trace_id:
            event.setdefault("trace_id", call.trace_id)
    return event


class _Libraries(logging.Handler):
    """Writes what libraries log in the form of everything else."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record (called by logging)."""
        try:
            log = structlog.get_logger(record.name)
            log.log(
                max(logging.WARNING, record.levelno),
                record.getMessage(),
                logger=record.name,
                **({"exc_info": record.exc_info} if record.exc_info else {}),
            )
        except Exception:
            self.handleError(record)


def _unless_the_client_went(record: logging.LogRecord) -> bool:
    """Let all pass but what grpcio says of an answer that nobody is there to take any more.

    It logs that with a traceback, as an error; whoever watches calls counts it as a cancelled one.
    """
    return not str(record.msg).startswith("ExecuteBatchError raised in core by servicer method")


def _uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    structlog.get_logger("pollard").critical(
        "the process ends by an error that nobody expected", exc_info=(kind, error, traceback)
    )


def _uncaught_in_thread(given: threading.ExceptHookArgs) -> None:
    if given.exc_value is None or issubclass(given.exc_type, SystemExit):
        return
    structlog.get_logger("pollard").error(
        "a thread ended by an error that nobody expected",
        thread=given.thread.name if given.thread is not None else "",
        exc_info=(given.exc_type, given.exc_value, given.exc_traceback),
    )


def _describe_lost(processors: list[structlog.types.Processor]) -> Callable[[int, str], str]:
    """Return what renders the line about lines that were lost, whichever levels are written."""
    log = structlog.wrap_logger(
        structlog.ReturnLogger(),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
    )

    def describe(lost: int, why: str) -> str:
        line: str = log.error("lines of this log were lost", lines=lost, why=why)
        return line

    return describe


def configure_logging(service: str, *, level: str = "info", form: Format = "console") -> None:
    """Set up structlog for a process; what libraries warn of is written in the same form.

    Args:
        service: Name that every line carries.
        level: Lowest level that is written.
        form: ``console`` for people, ``json`` for collectors.
    """
    set_enabled_levels(_LEVELS[_LEVELS.index(level) :])
    # What libraries print must not hold the service up either, so this takes the place of it.
    stream = stream_of(sys.stderr)
    if stream is not None:
        sys.stderr = stream
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
        # Not by a context variable, which threads that libraries start do not have.
        lambda _, __, event: {**event, "service": service},
        _add_call,
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
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    if stream is not None:
        stream.describe = _describe_lost([*processors[1:], renderer])
    root = logging.getLogger()
    if not any(isinstance(handler, _Libraries) for handler in root.handlers):
        root.addHandler(_Libraries(logging.WARNING))
    logging.getLogger("grpc._cython.cygrpc").addFilter(_unless_the_client_went)
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
