"""Page tokens: what comes back is what was given, or is refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from pollard.services.common.errors import InvalidRequest
from pollard.services.models.names import make_page_token, read_page_token

QUERY = {"list": "things", "filter": "x"}


@pytest.mark.parametrize("last", [["a", 1], ["", -(2**63)], ["a b-c.d_e/f", 2**63 - 1]])
def test_a_token_holds_where_its_page_ended(last: list[Any]) -> None:
    assert read_page_token(QUERY, make_page_token(QUERY, last), str, int) == last
    assert read_page_token(QUERY, "", str, int) is None


@pytest.mark.parametrize(
    "last",
    [
        ["a"], ["a", 1, 1], [1, 1], ["a", "1"], ["a", 1.0], ["a", True], ["a", None], ["a", [1]],
        ["a", 2**63], ["a", -(2**63) - 1], ["a\0", 1], ["a\n", 1], ["\ud800", 1], ["ä", 1],
    ],
)  # fmt: skip
def test_a_token_that_somebody_made_up_is_refused(last: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match="not one that this service gave"):
        read_page_token(QUERY, make_page_token(QUERY, last), str, int)


@pytest.mark.parametrize("text", ["rubbish", "ä", "e30=", "W10=", "WzEsMl0=", "bnVsbA==", "="])
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="page_token"):
        read_page_token(QUERY, text, str, int)


def test_a_token_of_another_query_is_refused() -> None:
    token = make_page_token(QUERY, ["a", 1])
    with pytest.raises(InvalidRequest, match="belongs to another query"):
        read_page_token({**QUERY, "filter": "y"}, token, str, int)
    raw = json.loads(base64.urlsafe_b64decode(token))
    assert raw[1] == ["a", 1]
