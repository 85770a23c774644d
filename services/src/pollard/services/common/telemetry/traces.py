"""Traces, as the rest of the services sees them: without OpenTelemetry until somebody wants them.

A call that is traced has a `Span` in its `CallRecord`. What happens on its way is drawn as spans
below that one. Nothing here is imported from OpenTelemetry: `otel` does that, once traces are on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Protocol, Self

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
"""Metadata keys of W3C's trace context."""

Pairs = tuple[tuple[str, str], ...]

Value = str | int | float | bool
Attributes = Mapping[str, Value]

_NONE: Attributes = {}


class Span(Protocol):
    """A piece of work in a trace, from its beginning to its end.

    One that is not recorded only passes the context on, so that who is called records nothing
    either.
    """

    recorded: bool
    """Whether anything is kept of it."""

    @property
    def trace_id(self) -> str:
        """The trace's id, 32 digits."""

    def headers(self) -> Pairs:
        """Return what a call carries that is made below this span."""

    def begin(self, name: str, kind: str = "internal", attributes: Attributes = _NONE) -> Span:
        """Begin a span below this one.

        Args:
            name: The same for all of its kind.
            kind: "internal", or "client" for a call of another server.
            attributes: Nothing secret, and nothing of what was sent.
        """

    def draw(
        self,
        name: str,
        began: int,
        ended: int,
        attributes: Attributes = _NONE,
        links: Sequence[Span] = (),
        marks: Sequence[tuple[str, int]] = (),
    ) -> None:
        """Add a span below this one that has ended already.

        Args:
            name: The same for all of its kind.
            began: On the clock of `time.perf_counter_ns`.
            ended: On the same clock.
            attributes: As in `begin`.
            links: Spans that it belongs to, too.
            marks: Names of moments in it, with when they were.
        """

    def set(self, **attributes: Value) -> None:
        """Add attributes, "pollard." before their names."""

    def mark(self, name: str) -> None:
        """Note that something has happened now."""

    def end(self, failed: str = "", code: int | None = None) -> None:
        """End it.

        Args:
            failed: In a word, why it failed; empty if it did not.
            code: The status of a call.
        """


class Tracer(Protocol):
    """Makes spans of one service."""

    def call(self, name: str, traceparent: str | bytes, tracestate: str | bytes) -> Span:
        """Begin the span of a call that has come.

        Args:
            name: "package.Service/Method".
            traceparent: The header; empty if there is none.
            tracestate: The header; empty if there is none.
        """

    def root(
        self, name: str, began: int, ended: int, attributes: Attributes, failed: str = ""
    ) -> None:
        """Add a trace of something that nobody has asked for; the clock is `perf_counter_ns`."""

    def shut_down(self, seconds: float) -> None:
        """Send what was not sent yet, for so long at most, and make no more spans."""


_tracer: Tracer | None = None
_span: ContextVar[Span | None] = ContextVar("pollard_span", default=None)


def tracer() -> Tracer | None:
    """Return what makes spans; None while traces are off."""
    return _tracer


def use(new: Tracer | None) -> None:
    """Make spans by `new` from now on."""
    global _tracer
    _tracer = new


def current_span() -> Span | None:
    """Return the span of what this task does, if it is traced."""
    return _span.get()


def set_span(span: Span | None) -> None:
    """Say what this task does."""
    _span.set(span)


def mark(name: str) -> None:
    """Note in the current span that something has happened now."""
    found = _span.get()
    if found is not None:
        found.mark(name)


class _Within:
    """A block of code as a span below the current one."""

    __slots__ = ("_before", "_span")

    def __init__(self, span: Span) -> None:
        self._span = span

    def __enter__(self) -> Span:
        self._before = _span.set(self._span)
        return self._span

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _span.reset(self._before)
        self._span.end(_word(error) if error is not None else "", _code(error))


class _Nothing:
    """What `within` returns while nothing is traced."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


_NOTHING = _Nothing()


def within(name: str, kind: str = "internal", attributes: Attributes = _NONE) -> _Within | _Nothing:
    """Make a block of code a span, if the call that it belongs to is traced; see `Span.begin`."""
    above = _span.get()
    if above is None or not above.recorded:
        return _NOTHING
    return _Within(above.begin(name, kind, attributes))


def _word(error: BaseException) -> str:
    reason: Any = getattr(error, "reason", "")
    return reason if isinstance(reason, str) and reason else type(error).__name__


def _code(error: BaseException | None) -> int | None:
    code: Any = getattr(error, "code", None)
    try:
        return int(code().value[0]) if callable(code) else None
    except (AttributeError, TypeError, IndexError):
        return None


class Noted:
    """What happened while a block of code ran, for a trace that is worth keeping only then."""

    __slots__ = ("_before", "things")

    def __init__(self) -> None:
        self.things: list[tuple[str, str]] = []
        """Pairs of what and to what."""

    def __enter__(self) -> Self:
        # A transaction may be tried more than once.
        self.things = []
        self._before = _noted.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _noted.reset(self._before)


_noted: ContextVar[Noted | None] = ContextVar("pollard_noted", default=None)


def note(what: str, of: str) -> None:
    """Note that something was done."""
    noted = _noted.get()
    if noted is not None:
        noted.things.append((what, of))
