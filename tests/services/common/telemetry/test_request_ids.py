"""What a call is called."""

from __future__ import annotations

import pytest

from pollard.services.common.telemetry.interceptor import named
from pollard.services.common.telemetry.request_ids import request_id_of


@pytest.mark.parametrize("given", ["a", "7f3a-11", b"order/77:a.b=c@d+e_f", "x" * 128])
def test_a_callers_id_is_kept(given: str | bytes) -> None:
    assert request_id_of(given) == (given if isinstance(given, str) else given.decode())


@pytest.mark.parametrize(
    "given", ["", "a b", "a\nlevel=info", "\x1b[2J", "é", b"\xff\xfe", "x" * 129, '"', "a\x00"]
)
def test_what_could_break_a_line_is_replaced(given: str | bytes) -> None:
    made = [request_id_of(given) for _ in range(50)]
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in made)
    assert len(set(made)) == 50


def test_of_two_headers_none_counts() -> None:
    assert named([("x-request-id", "a"), ("other", "b"), ("traceparent", "c")]) == ("a", "c", "")
    assert named([("x-request-id", "a"), ("x-request-id", "b")]) == ("", "", "")
    assert named([("x-request-id", "a")] * 3) == ("", "", "")
    assert named(None) == ("", "", "")
