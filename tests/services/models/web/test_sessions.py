"""Who looks at the page where tokens are asked for."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pytest

from pollard.services.common.auth.callers import Limits, Role
from pollard.services.common.auth.tokens import KnownToken, TokenTable, digest_of, id_of, make_token
from pollard.services.models.schema import Event

HTML = {"Accept": "text/html"}


class Tokens:
    """Tokens that a manager knows."""

    def __init__(self, gate: Any) -> None:
        self._gate = gate
        self._known: dict[str, KnownToken] = {}
        gate.know(TokenTable.of([]))

    def make(self, role: Role, **more: Any) -> str:
        token = make_token()
        self._known[token] = KnownToken(
            id_of(token), f"the-{role.value}", digest_of(token), role, **more
        )
        self._gate.know(TokenTable.of(self._known.values()))
        return token

    def change(self, token: str, **how: Any) -> None:
        self._known[token] = replace(self._known[token], **how)
        self._gate.know(TokenTable.of(self._known.values()))


@pytest.fixture
async def locked(suite_with: Callable[..., Any]) -> AsyncIterator[tuple[Any, Tokens]]:
    """A manager that asks for tokens, and these."""
    async with suite_with(stocked=True, tokens=True) as suite:
        yield suite, Tokens(suite.service.gate)


async def sign_in(visitor: Any, token: str, following: str = "/") -> Any:
    form = await visitor.get(f"/login?next={quote(following, safe='')}")
    csrf = re.search(r'name="csrf" value="([0-9a-f]{64})"', form.text)
    assert csrf
    return await visitor.post("/login", csrf=csrf[1], token=token, next=following)


async def test_who_is_not_known_sees_nothing(locked: Any, visit: Any) -> None:
    suite, tokens = locked
    visitor = visit(suite)
    for path in ("/", "/models/m", "/fleet", "/log", "/models/m/revisions/2/report.html"):
        sent = await visitor.get(path, **HTML)
        assert (sent.status, sent.headers["Location"][:12]) == (303, "/login?next=")
        refused = await visitor.get(path)
        assert refused.status == 401
        assert "production" not in refused.text
    assert (await visitor.get("/", Accept="text/event-stream")).status == 401
    refused = await visitor.post("/models/m/rollouts", csrf="0" * 64, revision="2")
    assert refused.status == 401
    for wrong in ("", "nonsense", make_token(), "x" * 9000):
        answer = await sign_in(visitor, wrong)
        assert answer.status in (401, 413)
        assert not wrong or wrong not in answer.text
    assert (await sign_in(visitor, tokens.make(Role.SERVER))).status == 403
    ended = tokens.make(Role.ADMIN, expires=time.time() - 1)
    assert "has expired" in (await sign_in(visitor, ended)).text
    assert (await visitor.get("/")).status == 401


async def test_a_session_is_begun_and_ended(locked: Any, visit: Any) -> None:
    suite, tokens = locked
    visitor = visit(suite)
    token = tokens.make(Role.PUBLISHER)
    begun = await sign_in(visitor, token, "/models/m?page=")
    assert (begun.status, begun.headers["Location"]) == (303, "/models/m?page=")
    cookies = begun.headers.getall("Set-Cookie")
    session = next(cookie for cookie in cookies if cookie.startswith("pollard-session="))
    assert "HttpOnly" in session
    assert "SameSite=Strict" in session
    assert token not in session
    # What could be pressed before somebody signed in cannot be pressed any more.
    assert any(cookie.startswith("pollard-visit=") for cookie in cookies)
    shown = await visitor.get("/models/m/revisions/2")
    assert "Signed in as the-publisher" in shown.text
    assert token not in shown.text
    assert (await visitor.post("/models/m/rollouts", revision="2", after="0")).status == 303
    assert (await actors(suite))["ROLLOUT_CREATED"].startswith("the-publisher (token ")
    left = await visitor.post("/logout")
    assert (left.status, left.headers["Location"]) == (303, "/login")
    assert (await visitor.get("/")).status == 401


async def actors(suite: Any) -> dict[str, str]:
    def read(session: Any) -> dict[str, str]:
        return {event.action: event.actor for event in session.query(Event)}

    return await suite.service.store.read(read)


async def test_only_places_of_the_page_are_gone_to(locked: Any, visit: Any) -> None:
    suite, tokens = locked
    token = tokens.make(Role.VIEWER)
    for following in ("//evil.example", "/\\evil.example", "http://evil.example", "/\r\nX: 1"):
        answer = await sign_in(visit(suite), token, following)
        assert (answer.status, answer.headers["Location"]) == (303, "/")
        assert "X" not in answer.headers


async def test_a_role_decides_what_can_be_pressed(locked: Any, visit: Any) -> None:
    suite, tokens = locked
    viewer = visit(suite)
    await sign_in(viewer, tokens.make(Role.VIEWER))
    page = await viewer.get("/models/m/revisions/2")
    assert "Start rollout" not in page.text
    csrf = re.search(r'name="csrf" value="([0-9a-f]{64})"', page.text)
    assert csrf
    for path, fields in (
        ("/models/m/rollouts", {"revision": "2"}),
        ("/models/m/aliases/production", {"revision": "2", "etag": "1"}),
        ("/models/m/aliases/production/rollback", {"etag": "1"}),
        ("/models/m/rollouts/1/abort", {}),
    ):
        refused = await viewer.post(path, csrf=csrf[1], **fields)
        assert (refused.status, "needs publisher" in refused.text) == (403, True), path
    assert "role predictor" in (await viewer.get("/models/m/try")).text
    assert not {"ROLLOUT_CREATED", "ALIAS_ROLLED_BACK"} & (await actors(suite)).keys()


async def test_a_token_in_a_header_is_as_good(locked: Any, visit: Any) -> None:
    suite, tokens = locked
    visitor = visit(suite)
    visitor.headers["Authorization"] = f"Bearer {tokens.make(Role.VIEWER)}"
    page = await visitor.get("/models/m")
    assert page.status == 200
    assert "Sign out" not in page.text
    visitor.headers["Authorization"] = f"Bearer {make_token()}"
    assert (await visitor.get("/models/m")).status == 401


async def test_a_revoked_token_ends_its_sessions_and_what_they_follow(
    locked: Any, visit: Any
) -> None:
    suite, tokens = locked
    visitor = visit(suite)
    token = tokens.make(Role.VIEWER)
    await sign_in(visitor, token)
    url = visitor.url + "/fleet"
    async with (
        asyncio.timeout(30),
        visitor.session.get(url, headers={"Accept": "text/event-stream"}) as stream,
    ):
        assert stream.status == 200
        tokens.change(token, revoked=True)
        text = (await stream.content.read()).decode()
    assert text.rstrip().endswith('event: gone\ndata: "you are no longer signed in"')
    assert (await visitor.get("/fleet")).status == 401


async def test_a_caller_that_uses_too_much_is_slowed_down(
    locked: Any, visit: Any, suite_with: Any
) -> None:
    suite, tokens = locked
    greedy, modest = visit(suite), visit(suite)
    limits = Limits(requests_per_second=0.001, burst=3)
    greedy.headers["Authorization"] = f"Bearer {tokens.make(Role.VIEWER, limits=limits)}"
    modest.headers["Authorization"] = f"Bearer {tokens.make(Role.VIEWER)}"
    statuses = [(await greedy.get("/log")).status for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    assert (await modest.get("/log")).status == 200


async def test_a_link_from_elsewhere_leads_in(locked: Any, visit: Any) -> None:
    suite, tokens = locked
    visitor = visit(suite)
    await sign_in(visitor, tokens.make(Role.VIEWER))
    stranger = visit(suite)
    # A browser holds the cookies back that are for this site's own requests only.
    again = await stranger.get(
        "/models/m",
        **{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
        **{"Sec-Fetch-Dest": "document"},
    )
    assert (again.status, "Set-Cookie" in again.headers) == (200, False)
    assert 'http-equiv="refresh"' in again.text
    assert "production" not in again.text
