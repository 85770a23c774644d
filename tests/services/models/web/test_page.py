"""What the page shows and changes, over real HTTP."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb

ACTIVE = pb.Alias.STATE_ACTIVE
RUNNING = (pb.Rollout.STATE_CANARY, pb.Rollout.STATE_SHADOW, pb.Rollout.STATE_PAUSED)

PAGES = (
    "/",
    "/models/m",
    "/models/m/revisions/2",
    "/models/m/try",
    "/fleet",
    "/log",
)


@pytest.fixture
async def served(suite_with: Callable[..., Any]) -> AsyncIterator[Any]:
    """A manager with three revisions of `m`, the first of them in production on one server."""
    async with suite_with(stocked=True) as suite:
        await suite.join("i1")
        yield suite


async def rollout(suite: Any, number: int = 1) -> pb.Rollout:
    request = pb.GetRolloutRequest(name=f"models/m/rollouts/{number}")
    return (await suite.client.models.GetRollout(request, timeout=30)).rollout


async def rollouts(suite: Any) -> int:
    request = pb.ListRolloutsRequest(parent="models/m")
    return len((await suite.client.models.ListRollouts(request, timeout=30)).rollouts)


def words(text: str) -> str:
    """What a reader sees of a page, in one line."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))


async def comes_about(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def test_every_page_shows_what_the_manager_holds(
    served: Any, visit: Any, helpers: Any
) -> None:
    visitor = visit(served)

    async def read() -> dict[str, Any]:
        return {path: await visitor.get(path) for path in PAGES}

    # A server is in step once it has acknowledged the newest state, not only the first.
    shown = await helpers.eventually(
        read,
        lambda shown: (
            "1 of 1 in step" in words(shown["/"].text) and "In step" in words(shown["/fleet"].text)
        ),
    )
    assert {path: answer.status for path, answer in shown.items()} == dict.fromkeys(PAGES, 200)
    assert "newest is 3" in words(shown["/"].text)
    assert re.search(r"production.*Active", words(shown["/models/m"].text))
    assert "N × 4 × 4 × 1" in words(shown["/models/m/revisions/2"].text)
    assert "No vision service is known" in shown["/models/m/try"].text
    assert re.search(r"i1 Inference In step .* Ready", words(shown["/fleet"].text))
    assert re.search(r"Alias switched .* m production", words(shown["/log"].text))
    # A server that refuses is named with its words.
    refusing = await served.join("i2", refuses={("m", 2)})
    await served.client.set_alias(2)
    await served.client.alias_when(lambda alias: alias.state == pb.Alias.STATE_FAILED)
    assert "i2 cannot" in (await visitor.get("/models/m")).text
    await refusing.close()
    refusing = await served.join("i3", automatic=False)
    refusing.nack(refusing.states[-1], "no room <here>")
    await helpers.eventually(lambda: served.client.server("i3"), lambda s: s.HasField("last_nack"))
    fleet = await visitor.get("/fleet")
    assert re.search(r"i3 Inference Refuses .* no room <here>", words(fleet.text))
    assert re.search(r"i2 Inference Away", words(fleet.text))
    # In a row of its own: the cell of the name is too narrow for it on a small screen.
    refusing.report(("m", 2, fleet_pb.REVISION_STATE_FAILED))
    row = r'<tr class="why"[^>]*><td colspan="4" class="trouble">i3 cannot'
    await helpers.eventually(
        lambda: visitor.get("/fleet"), lambda answer: bool(re.search(row, answer.text))
    )


async def test_what_is_not_there_is_said_on_a_page(served: Any, visit: Any) -> None:
    visitor = visit(served)
    for path, status in (
        ("/models/none", 404),
        ("/models/m/revisions/99", 404),
        ("/models/m/rollouts/7", 404),
        ("/models/UPPER", 400),
        ("/models/m/revisions/2/report.html", 404),
        ("/?page=nonsense", 400),
    ):
        answer = await visitor.get(path)
        assert (answer.status, answer.headers["Content-Type"]) == (
            status,
            "text/html; charset=utf-8",
        ), path
        assert "<h1>" in answer.text
    found = await visitor.get("/?filter=" + "labels.team%20%3D%3D%20x")
    assert found.status == 200
    assert 'role="alert"' in found.text
    assert "No model fits" in (await visitor.get("/?filter=zebra")).text
    assert 'href="/models/m"' in (await visitor.get("/?filter=M")).text


async def test_what_people_wrote_is_shown_as_text(
    suite: Any, visit: Any, helpers: Any, bundles: Any
) -> None:
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}"
    says = helpers.manifest()
    says.name = attack
    says.provenance.source = attack
    says.provenance.tool_versions[attack] = attack
    client = suite.client
    await client.push(bundles.tar(1, says=says), notes=attack, labels={"<b>": attack})
    await client.models.UpdateModel(
        pb.UpdateModelRequest(
            model=pb.Model(name="models/m", description=attack, labels={"<i>": attack})
        )
    )
    visitor = visit(suite)
    seen = ""
    for path in (*(path.replace("/2", "/1") for path in PAGES), "/?filter=" + "%3Cscript%3E"):
        answer = await visitor.get(path)
        assert answer.status == 200
        seen += answer.text
        # Only our own script, from its own file.
        assert len(re.findall(r"<script", answer.text)) == 1
        assert (
            len(re.findall(r'<script src="/assets/\w+/page\.js" defer></script>', answer.text)) == 1
        )
        assert "<img" not in answer.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in seen
    assert "{{7*7}}" in seen


async def test_every_answer_says_what_a_browser_may_do(served: Any, visit: Any) -> None:
    visitor = visit(served)
    for path in (*PAGES, "/models/none"):
        headers = (await visitor.get(path)).headers
        policy = dict(
            part.strip().partition(" ")[::2]
            for part in headers["Content-Security-Policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Server"] == "Pollard"
    page = await visit(served).get("/")
    cookie = page.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    # Nothing comes from elsewhere.
    for target in re.findall(r'(?:src|href|action)="([^"]*)"', page.text):
        assert target.startswith(("/", "#")), target
        assert not target.startswith("//")
    for path in re.findall(r'"(/assets/[^"]*)"', page.text):
        asset = await visitor.get(path)
        assert asset.status == 200
        assert "immutable" in asset.headers["Cache-Control"]
        assert "http" not in asset.text.replace("http://www.w3.org/2000/svg", "")


async def test_no_path_leads_out_of_the_page(served: Any, visit: Any) -> None:
    visitor = visit(served)
    digest = re.findall(r"/assets/([0-9a-f]{16})/", (await visitor.get("/")).text)[0]
    for path in (
        f"/assets/{digest}/..%2f..%2fpage.py",
        f"/assets/{digest}/%2e%2e/%2e%2e/page.py",
        "/assets/x/page.css",
        "/models/..%2f..%2fetc/revisions/1/report.html",
        "/models/%2e%2e",
        "/models/m%00",
        "/models/m/revisions/1%2f..%2f2",
        "/models/m/revisions/00000000000000000000001",
        "/models/m/revisions/99999999999999999999",
        "/static/../../etc/passwd",
    ):
        answer = await visitor.get(path)
        assert answer.status in (400, 404), (path, answer.status)
        assert "root:" not in answer.text
        assert "import annotations" not in answer.text


async def test_a_form_of_another_site_changes_nothing(served: Any, visit: Any) -> None:
    visitor, other = visit(served), visit(served)
    await other.get("/")
    foreign = await other.csrf()
    path = "/models/m/rollouts"
    for headers, fields in (
        ({}, {"csrf": ""}),
        ({}, {"csrf": "0" * 64}),
        ({}, {"csrf": foreign}),
        ({"Origin": "http://evil.example"}, {}),
        ({"Origin": "null"}, {}),
        ({"Origin": visitor.url.replace("127.0.0.1", "127.0.0.2")}, {}),
        ({"Sec-Fetch-Site": "cross-site"}, {}),
        ({"Sec-Fetch-Site": "same-site"}, {}),
    ):
        answer = await visitor.post(path, headers, revision="2", **fields)
        assert answer.status == 403, (headers, fields)
        assert "nothing was changed" in answer.text
    assert (await visitor.post(path, {"Content-Type": "text/plain"}, revision="2")).status == 415
    long = await visitor.post(path, revision="2", padding="x" * 70_000)
    assert long.status == 413
    assert await rollouts(served) == 0
    # A browser that does not say where it comes from still has to know the visit.
    visitor.origin = False
    assert (await visitor.post(path, revision="2")).status == 303
    assert await rollouts(served) == 1


async def test_a_name_that_is_not_ours_is_not_answered(
    suite_with: Callable[..., Any], visit: Any
) -> None:
    async with suite_with(stocked=True, page_hosts="pollard.example, other.example") as suite:
        visitor = visit(suite)
        for host, status in (
            ("evil.example", 421),
            ("127.0.0.1.evil.example", 421),
            ("localhost", 200),
            ("[::1]:8022", 200),
            ("pollard.example:8022", 200),
            ("POLLARD.example", 200),
        ):
            assert (await visitor.get("/", Host=host)).status == status, host
        answer = await visitor.post("/models/m/rollouts", {"Host": "evil.example"}, revision="2")
        assert answer.status == 421
        assert await rollouts(suite) == 0


async def test_a_rollout_is_begun_and_steered_by_forms(served: Any, visit: Any) -> None:
    visitor = visit(served)
    wish = {
        "revision": "2",
        "alias": "production",
        "steps": "10, 50,100 %",
        "hold": "3600",
        "min_requests": "7",
        "max_error_rate": "2",
        "max_p99_ratio": "1.5",
        "shadow_percent": "",
        "min_agreement": "",
        "after": "0",
    }
    begun = await visitor.post("/models/m/rollouts", **wish)
    assert (begun.status, begun.headers["Location"]) == (303, "/models/m/rollouts/1")
    # Sent twice it is one wish.
    assert (await visitor.post("/models/m/rollouts", **wish)).status == 303
    assert await rollouts(served) == 1
    made = await rollout(served)
    assert list(made.steps) == [10, 50, 100]
    assert (made.hold.seconds, made.gates.min_requests) == (3600, 7)
    assert made.gates.max_error_rate == pytest.approx(0.02)
    path = "/models/m/rollouts/1"
    for action, state in (
        ("pause", pb.Rollout.STATE_PAUSED),
        ("resume", pb.Rollout.STATE_CANARY),
    ):
        etag = await visitor.etag(path, f"{path}/{action}")
        for _ in range(2):
            assert (await visitor.post(f"{path}/{action}", etag=etag)).status == 303
        assert (await rollout(served)).state == state
    assert (await visitor.post(f"{path}/explode", etag="")).status == 404
    etag = await visitor.etag(path, f"{path}/abort")
    for _ in range(2):
        assert (await visitor.post(f"{path}/abort", etag=etag)).status == 303
    assert (await rollout(served)).state == pb.Rollout.STATE_ROLLED_BACK
    # What cannot be done is said where it was asked for.
    refused = await visitor.post(f"{path}/promote", etag="")
    assert refused.status == 409
    assert "That was refused." in refused.text
    assert "Rolled back" in refused.text
    who = (await served.client.models.ListEvents(pb.ListEventsRequest(model="models/m"))).events
    assert "ipv4:127.0.0.1" in {e.actor for e in who if e.action == "ROLLOUT_CREATED"}


async def test_a_form_that_is_refused_keeps_what_was_written(served: Any, visit: Any) -> None:
    visitor = visit(served)
    for wrong, status, why in (
        ({"steps": "50, 20, 100"}, 400, "growing shares"),
        ({"steps": "half"}, 400, "is not a number"),
        ({"hold": "inf"}, 400, "is not a number"),
        ({"hold": "-1"}, 400, "must be 0 s to 30 days"),
        ({"min_requests": "1.5"}, 400, "is not a whole number"),
        ({"max_error_rate": "0.0000000001e-300"}, 303, ""),
        ({"alias": "none"}, 404, "has no alias"),
    ):
        answer = await visitor.post(
            "/models/m/rollouts", **({"revision": "2", "hold": "61", "after": "0"} | wrong)
        )
        assert answer.status == status, (wrong, answer.text)
        if status != 303:
            assert why in html.unescape(answer.text)
            assert 'value="61"' in answer.text or "hold" in wrong


async def test_an_alias_is_switched_and_rolled_back(served: Any, visit: Any) -> None:
    visitor = visit(served)
    path = "/models/m/aliases/production"
    etag = await visitor.etag("/models/m/revisions/3", path)
    assert (await visitor.post(path, revision="3", etag=etag)).status == 303
    await served.client.alias_when(lambda a: a.state == ACTIVE and a.revision == 3)
    # The page that the form came from is out of date by now.
    assert (await visitor.post(path, revision="2", etag=etag)).status == 409
    etag = await visitor.etag("/models/m", f"{path}/rollback")
    for _ in range(2):
        assert (await visitor.post(f"{path}/rollback", etag=etag)).status == 303
    alias = await served.client.alias_when(lambda a: a.state == ACTIVE and a.revision == 1)
    assert alias.previous_revision == 3
    assert (await visitor.post(f"{path}/rollback")).status == 400
    assert (await visitor.post("/models/m/aliases/77/rollback", etag="1")).status == 400


async def test_a_report_is_shown_apart(suite: Any, visit: Any, bundles: Any) -> None:
    report = b"<!doctype html><h1>Fine</h1><script>top.location='http://evil.example'</script>"
    await suite.client.push(bundles.tar(1, **{"report.html": report}))
    visitor = visit(suite)
    framed = await visitor.get("/models/m/revisions/1/report")
    assert 'sandbox="allow-scripts"' in framed.text
    content = await visitor.get("/models/m/revisions/1/report.html", **{"Sec-Fetch-Dest": "iframe"})
    assert content.text.encode() == report
    policy = content.headers["Content-Security-Policy"]
    assert policy.startswith("sandbox allow-scripts; default-src 'none'")
    assert "frame-ancestors 'self'" in policy
    alone = await visitor.get("/models/m/revisions/1/report.html", **{"Sec-Fetch-Dest": "document"})
    assert (alone.status, alone.headers["Location"]) == (302, "/models/m/revisions/1/report")


async def events_of(visitor: Any, path: str, until: str) -> list[tuple[str, str]]:
    """The events of a page's stream, up to the first that holds some words."""
    found = []
    headers = {"Accept": "text/event-stream"}
    async with asyncio.timeout(30), visitor.session.get(visitor.url + path, headers=headers) as got:
        assert got.headers["Content-Type"].startswith("text/event-stream")
        name = ""
        async for line in got.content:
            text = line.decode().rstrip("\n")
            if text.startswith("event: "):
                name = text[7:]
            elif text.startswith("data: "):
                found.append((name, text[6:]))
                if until in text:
                    return found
    raise AssertionError(f"the stream ended: {found}")


async def test_changes_are_sent_as_they_happen(served: Any, visit: Any) -> None:
    visitor = visit(served)
    following = asyncio.create_task(events_of(visitor, "/models/m", "Alias set"))
    await comes_about(lambda: served.service.page.live.streams == 1)
    await served.client.set_alias(2)
    found = await following
    assert found[0][0] == "version"
    assert {name for name, _ in found[1:]} == {"part"}
    # Who has gone is forgotten, and a manager that stops lets nobody wait.
    await comes_about(lambda: served.service.page.live.streams == 0)
    following = asyncio.create_task(events_of(visitor, "/fleet", "never"))
    await comes_about(lambda: served.service.page.live.streams == 1)
    service, served.service = served.service, None
    async with asyncio.timeout(20):
        await service.stop(0)
    with pytest.raises(AssertionError, match="the stream ended"):
        await following


async def test_only_so_many_follow_at_once(
    served: Any, visit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pollard.services.models.web.live.MOST", 1)
    visitor = visit(served)
    following = asyncio.create_task(events_of(visitor, "/fleet", "never"))
    await comes_about(lambda: served.service.page.live.streams == 1)
    refused = await visitor.get("/log", Accept="text/event-stream")
    assert (refused.status, refused.headers["Retry-After"]) == (503, "30")
    assert (await visitor.get("/log")).status == 200
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
