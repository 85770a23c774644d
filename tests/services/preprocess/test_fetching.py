"""Images by URI: fetched from where it is allowed, and never from inside."""

import asyncio
import ipaddress
import sys

import grpc
import pytest
from aiohttp import web

from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.runtime.errors import ImageTooLarge
from pollard.services.common.errors import StartupError
from pollard.services.preprocess.contents import ImageContents
from pollard.services.preprocess.errors import RequestInvalid, UriRefused, UriUnreachable
from pollard.services.preprocess.fetching import Fetcher, FetchRules, is_public
from pollard.vision.v1 import vision_service_pb2 as vision_pb


class Site:
    """A real HTTP server whose answers a test decides."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.headers: dict[str, str] = {}
        self.stopped = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        self.headers = dict(request.headers)
        if request.path.startswith("/to/"):
            raise web.HTTPFound(request.query["where"])
        if request.path == "/loop":
            raise web.HTTPFound("/loop")
        if request.path == "/slow":
            await asyncio.sleep(60)
        if request.path.startswith("/status/"):
            return web.Response(status=int(request.path.rpartition("/")[2]), text="secret words")
        if request.path.startswith("/bytes/"):
            return web.Response(body=b"x" * int(request.path.rpartition("/")[2]))
        if request.path == "/endless":
            response = web.StreamResponse()
            await response.prepare(request)
            try:
                while True:
                    await response.write(b"x" * 65536)
            finally:
                self.stopped.set()
        if request.path == "/broken":
            response = web.StreamResponse(headers={"Content-Length": "100"})
            await response.prepare(request)
            await response.write(b"half")
            assert request.transport is not None
            request.transport.abort()
            return response
        return web.Response(body=b"an image")


@pytest.fixture
async def site():
    site = Site()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", site.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listening = web.TCPSite(runner, "127.0.0.1", 0)
    await listening.start()
    site.port = runner.addresses[0][1]
    site.url = f"http://127.0.0.1:{site.port}"
    yield site
    await runner.cleanup()


@pytest.fixture
async def fetcher(site):
    """Fetches from the test's own site, which is not public; nothing else is different."""
    made = []

    def make(*hosts: str, allows=lambda address: True, **rules) -> Fetcher:
        named = hosts or (f"127.0.0.1:{site.port}", f"localhost:{site.port}")
        settings = {"allow_http": True, "timeout_seconds": 5.0, **rules}
        made.append(Fetcher(FetchRules(named, **settings), allows))
        return made[-1]

    yield make
    for each in made:
        await each.close()


async def test_an_image_is_fetched_without_telling_more_than_needed(site, fetcher):
    assert await fetcher().fetch(f"{site.url}/a.png?size=1") == b"an image"
    assert await fetcher().fetch(f"http://localhost:{site.port}/b.png") == b"an image"
    assert site.asked == ["/a.png", "/b.png"]
    assert site.headers["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Authorization", "Referer"} & set(site.headers)


async def test_redirections_are_followed_and_judged_each(site, fetcher):
    client = fetcher()
    assert await client.fetch(f"{site.url}/to/1?where=/b.png") == b"an image"
    for where in ("https://elsewhere.example/x", "file:///etc/passwd", "http://127.0.0.1:1/x"):
        with pytest.raises(UriRefused):
            await client.fetch(f"{site.url}/to/1?where={where}")
    with pytest.raises(UriRefused, match="more than 3"):
        await client.fetch(f"{site.url}/loop")
    assert site.asked.count("/loop") == 4


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("ftp://127.0.0.1/a", "http URIs only"),
        ("file:///etc/passwd", "http URIs only"),
        ("", "http URIs only"),
        ("//host/path", "http URIs only"),
        ("http://", "http URIs only"),
        ("http://[::1", "cannot be read"),
        ("http://host:99999/", "cannot be read"),
        ("http://user:word@127.0.0.1/", "user name or password"),
        ("http://other.example/", "does not fetch from that host"),
        ("http://127.0.0.1:1/", "does not fetch from that host"),
        ("http://127.0.0.1/" + "a" * 5000, "longer than 4096"),
    ],
)
async def test_what_the_rules_do_not_allow_is_refused(fetcher, site, uri, words):
    with pytest.raises(UriRefused, match=words):
        await fetcher().fetch(uri)
    assert site.asked == []


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "localhost.",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "169.254.169.254",
        "10.0.0.1",
        "192.168.1.1",
        "2130706433",
        "0x7f.1",
        "0177.0.0.1",
    ],
)
async def test_no_address_inside_is_connected_to_however_it_is_written(site, host):
    """With any host allowed; a name that resolves to an address inside is one, too."""
    names = ("*", f"localhost:{site.port}", f"{host.strip('[]')}:{site.port}")
    client = Fetcher(FetchRules(names, allow_http=True, timeout_seconds=5.0))
    try:
        for port in ("", f":{site.port}"):
            with pytest.raises((UriRefused, UriUnreachable)):
                await client.fetch(f"http://{host}{port}/secret.png")
    finally:
        await client.close()
    assert site.asked == []


async def test_the_address_that_was_checked_is_the_one_that_is_used(site, fetcher):
    """A name that leads outside when it is looked at, and inside when it is connected to."""
    seen = []

    def allows(address) -> bool:
        seen.append(address)
        return len(seen) > 1

    client = fetcher(allows=allows)
    with pytest.raises(UriRefused, match="not a public one"):
        await client.fetch(f"http://localhost:{site.port}/x.png")
    assert await client.fetch(f"http://localhost:{site.port}/x.png") == b"an image"
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::808:808", True),
    ],
)
def test_what_is_public(address, public):
    assert is_public(ipaddress.ip_address(address)) is public


async def test_hosts_are_allowed_by_name_below_a_name_and_with_a_port(site, fetcher):
    https = Fetcher(FetchRules(("a.example", "*.b.example", "c.example:8443")), lambda _: False)
    try:
        for uri in (
            "http://a.example/",
            "https://x.a.example/",
            "https://b.example/",
            "https://b.example.evil.org/",
            "https://notb.example/",
            "https://a.example:8443/",
            "https://c.example/",
        ):
            with pytest.raises(UriRefused):
                https._check(uri)
        for uri in ("https://A.example/", "https://x.y.b.example/", "https://c.example:8443/"):
            https._check(uri)
    finally:
        await https.close()


async def test_statuses_tell_whether_trying_again_may_help(site, fetcher):
    client = fetcher()
    for status, kind in ((404, UriRefused), (403, UriRefused), (204, UriRefused)):
        with pytest.raises(kind, match=f"answered {status}") as raised:
            await client.fetch(f"{site.url}/status/{status}")
        assert "secret" not in str(raised.value)
    for status in (500, 503, 429):
        with pytest.raises(UriUnreachable, match=f"answered {status}"):
            await client.fetch(f"{site.url}/status/{status}")


async def test_what_is_too_large_is_not_read_to_its_end(site, fetcher):
    client = fetcher(max_bytes=100_000)
    assert len(await client.fetch(f"{site.url}/bytes/100000")) == 100_000
    with pytest.raises(ImageTooLarge, match="more than 100000 bytes"):
        await client.fetch(f"{site.url}/bytes/100001")
    with pytest.raises(ImageTooLarge):
        await client.fetch(f"{site.url}/endless")
    async with asyncio.timeout(20):
        await site.stopped.wait()


async def test_a_server_that_does_not_answer_costs_its_time_and_no_more(site, fetcher):
    with pytest.raises(UriUnreachable, match=r"within 0\.3 s"):
        await fetcher(timeout_seconds=0.3).fetch(f"{site.url}/slow")
    with pytest.raises(UriUnreachable, match="broke off"):
        await fetcher().fetch(f"{site.url}/broken")
    nobody = fetcher("127.0.0.1:9")
    with pytest.raises(UriUnreachable, match="cannot be reached"):
        await nobody.fetch("http://127.0.0.1:9/x")
    names = fetcher("*", "no-such-host.invalid")
    with pytest.raises(UriUnreachable):
        await names.fetch("http://no-such-host.invalid/x")


async def test_the_images_of_a_request_have_a_limit_together(site, fetcher):
    contents = ImageContents(fetcher(), max_total_bytes=2500)
    images = [preprocess_pb.Image(uri=f"{site.url}/bytes/1000") for _ in range(3)]
    outcomes = await contents.each([*images, preprocess_pb.Image(content=b"mine")])
    assert sum(outcome == b"x" * 1000 for outcome in outcomes[:3]) == 2
    assert sum(isinstance(outcome, RequestInvalid) for outcome in outcomes[:3]) == 1
    assert outcomes[3] == b"mine"
    with pytest.raises(RequestInvalid, match="name fewer"):
        await contents.all(images)


async def test_nothing_is_fetched_unless_a_setting_says_so(suite):
    request = vision_pb.PredictRequest(
        model=preprocess_pb.ModelSelector(model="linear"),
        image=preprocess_pb.Image(uri="https://example.org/x.png"),
    )
    with pytest.raises(grpc.aio.AioRpcError, match="fetches no URIs") as raised:
        await suite.vision.Predict(request)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_server_that_may_fetch_refuses_its_own_network(suite, site, start_preprocess):
    replica = await start_preprocess("preprocess-2", uri_hosts=("*",), uri_allow_http=True)
    async with asyncio.timeout(20):
        while not replica.server.agent.settled.is_set():
            await asyncio.sleep(0.05)
    good = preprocess_pb.Image(content=b"no image either")
    inside = preprocess_pb.Image(uri="http://127.0.0.1/x.png")
    request = vision_pb.PredictBatchRequest(
        model=preprocess_pb.ModelSelector(model="linear"), images=[inside, good]
    )
    response = await replica.vision.PredictBatch(request)
    assert [result.error.reason for result in response.results] == [
        "URI_REFUSED",
        "IMAGE_UNSUPPORTED",
    ]
    assert site.asked == []


def test_without_aiohttp_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    Fetcher(FetchRules())
    with pytest.raises(StartupError, match=r"pollard-services\[uris\]"):
        Fetcher(FetchRules(("*",)))
