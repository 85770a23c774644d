"""Levels that change while a service runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from pollard.services.common.logs import configure_logging, enabled_levels, set_enabled_levels


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = enabled_levels()
    yield
    set_enabled_levels(before)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_a_logger_that_was_used_before_follows(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("test", level="warning", form="json")
    log = structlog.get_logger("test")

    def written() -> list[str]:
        for level in ("debug", "info", "warning", "error"):
            getattr(log, level)("said")
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        # Threads that other tests left behind may say something, too.
        return [line["level"] for line in lines if line["event"] == "said"]

    assert written() == ["warning", "error"]
    set_enabled_levels({"debug", "info"})
    assert written() == ["debug", "info"]
    set_enabled_levels({"error"})
    assert written() == ["error"]
    assert enabled_levels() == {"error", "critical"}
    try:
        raise ValueError("what happened")
    except ValueError:
        set_enabled_levels(())
        log.exception("an exception")
        assert "an exception" not in capsys.readouterr().err
        log.critical("the end")
    assert "the end" in capsys.readouterr().err


def test_a_client_that_went_is_no_error_of_grpc(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("test", level="info", form="json")
    configure_logging("test", level="info", form="json")
    log = logging.getLogger("grpc._cython.cygrpc")
    try:
        raise RuntimeError("what happened")
    except RuntimeError:
        # As grpcio writes them: the first when an answer finds nobody.
        log.exception("ExecuteBatchError raised in core by servicer method [%s]", "/a.B/C")
        log.exception("Unexpected [%s] raised by servicer method [%s]", "RuntimeError", "/a.B/C")
    # Of this method alone: threads that other tests left behind may say something, too.
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "/a.B/C" in line)
    told = json.loads(line)
    assert told["event"] == "Unexpected [RuntimeError] raised by servicer method [/a.B/C]"
    assert told["level"] == "error"
    assert "what happened" in told["exception"]
