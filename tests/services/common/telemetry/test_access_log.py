"""Which calls have a line, and how many lines there are at most."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
import structlog

from pollard.services.common.call_metrics import CallMetrics
from pollard.services.common.telemetry.access_log import AccessLog
from pollard.services.common.telemetry.codes import NAMES
from pollard.services.common.telemetry.record import CallWatch

PATH = "/pollard.vision.v1.VisionService/Predict"
OK, CANCELLED, INVALID, NOT_FOUND, INTERNAL, UNAUTHENTICATED = 0, 1, 3, 5, 13, 16


def told(log: AccessLog, *codes: int, path: str = PATH) -> list[Any]:
    metrics = CallMetrics()
    metrics.add(path)
    watch = CallWatch(metrics, log)
    with structlog.testing.capture_logs() as lines:
        for code in codes:
            record = watch.begin(path, request_id="r1")
            record.caller = "alice"
            if code:
                record.failed("REASON", "why " * 1000)
            record.end(code)
    return lines


def test_failures_are_told_with_their_cause() -> None:
    lines = told(AccessLog("failures"), OK, CANCELLED, UNAUTHENTICATED, INVALID, INTERNAL)
    assert [(line["code"], line["log_level"]) for line in lines] == [
        ("INVALID_ARGUMENT", "info"),
        ("INTERNAL", "warning"),
    ]
    line = lines[0]
    assert (line["event"], line["method"], line["request_id"]) == ("failed", PATH, "r1")
    assert (line["caller"], line["reason"]) == ("alice", "REASON")
    assert len(line["why"]) == 300
    assert line["milliseconds"] >= 0


def test_all_calls_are_told_if_that_is_wanted_but_probes() -> None:
    lines = told(AccessLog("all"), OK, CANCELLED, UNAUTHENTICATED)
    assert [line["code"] for line in lines] == ["OK", "CANCELLED", "UNAUTHENTICATED"]
    assert told(AccessLog("all"), OK, path="/grpc.health.v1.Health/Check") == []
    assert told(AccessLog("off"), OK, INTERNAL) == []


def test_a_call_ends_once() -> None:
    watch = CallWatch(access=AccessLog("all"))
    calls = watch.metrics.add(PATH)
    with structlog.testing.capture_logs() as lines:
        record = watch.begin(PATH)
        record.end(INTERNAL)
        record.end()
    assert len(lines) == 1
    assert (calls.started, calls.codes) == (1, {INTERNAL: 1})


def test_what_is_too_much_is_left_out_and_counted() -> None:
    now = 0.0
    log = AccessLog("failures", per_second=2.0, clock=lambda: now)
    assert len(told(log, *[NOT_FOUND] * 100)) == 10
    now = 0.4
    assert told(log, NOT_FOUND) == []
    now = 0.6
    (line,) = told(log, NOT_FOUND)
    assert line["left_out_before"] == 91
    now = 1000.0
    lines = told(log, *[NOT_FOUND] * 100)
    assert len(lines) == 10
    assert "left_out_before" not in lines[0]


@pytest.mark.parametrize("status", [200, 302, 401, 404, 500])
def test_http_is_told_in_the_same_way(status: int) -> None:
    with structlog.testing.capture_logs() as lines:
        AccessLog("failures").note_http("GET", "/models/x", status, 0.0123, "r1")
        AccessLog("all").note_http("GET", "/models/x", 200, 0.0123, "r2")
    told = [line for line in lines if line["request_id"] == "r1"]
    assert [line["status"] for line in told] == ([status] if status in (404, 500) else [])
    assert lines[-1]["request_id"] == "r2"
    assert lines[-1]["milliseconds"] == 12.3


def test_statuses_have_grpcs_names() -> None:
    assert {code.value[0]: code.name for code in grpc.StatusCode} == NAMES
