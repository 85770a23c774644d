"""Bundles that servers fetch from S3 themselves, and what happens where they cannot."""

from __future__ import annotations

import asyncio
import json
import random
import re
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import structlog

from pollard.models.v1 import model_service_pb2 as pb
from pollard.runtime.bundle import Bundle
from pollard.services.common.bundle_cache import BundleCache
from pollard.services.common.bundle_source import BundleSource
from pollard.services.common.direct_fetch import (
    DirectFetch,
    DirectFetchFailed,
    FetchLimits,
    RemoteFile,
)
from pollard.services.common.errors import ServiceError, StartupError
from pollard.services.models.blobs_s3 import S3Blobs
from pollard.services.models.settings import ModelsSettings

BALLAST = random.Random(5).randbytes(3_500_000)
QUICK = FetchLimits(connect_seconds=2.0, piece_seconds=1.0, pause_seconds=0.01)


def signatures_in(text: str) -> set[str]:
    return set(re.findall(r"X-Amz-Signature=([0-9a-f]+)", text))


@dataclass
class Fetching:
    """A server's part that gets bundles, a manager with its blobs in S3, and a bundle in both."""

    suite: Any
    s3: Any
    bundle: Bundle
    source: BundleSource
    cache: BundleCache
    log: list[Any] = field(default_factory=list)

    @property
    def ballast_key(self) -> str:
        [sha256] = [f.sha256 for f in self.bundle.manifest.files if f.path == "ballast.bin"]
        return f"pollard/sha256/{sha256[:2]}/{sha256}"

    async def fetch(self) -> Bundle:
        """Fetch the bundle, check it as whoever loads it does, and that no secret was told."""
        with structlog.testing.capture_logs() as log:
            path = await self.source.fetch(self.bundle.digest)
        self.log = log
        got = await asyncio.to_thread(Bundle.open, path, verify=True, expect=self.bundle.digest)
        assert (path / "ballast.bin").read_bytes() == BALLAST
        known = set().union(*(signatures_in(where) for _, where in self.s3.requests))
        told = json.dumps(log, default=repr)
        assert not any(signature in told for signature in known)
        assert "X-Amz" not in told
        return got

    @property
    def warned(self) -> str:
        return " ".join(entry.get("error", "") for entry in self.log)

    @property
    def directly(self) -> list[str]:
        """Requests that were made by a URL that the manager has signed."""
        return [where for _, where in self.s3.requests if "X-Amz-Signature" in where]

    @property
    def by_the_manager(self) -> list[str]:
        return [
            where
            for method, where in self.s3.requests
            if method == "GET" and self.ballast_key in where and "X-Amz-Signature" not in where
        ]


@pytest.fixture
async def make_fetching(
    suite_with: Any, s3: Any, bundles: Any, helpers: Any, tmp_path: Path
) -> AsyncIterator[Callable[..., Any]]:
    made: list[Fetching] = []
    suites: list[Any] = []

    async def make(**how: Any) -> Fetching:
        entered = suite_with(blobs="s3://bucket/pollard", blobs_endpoint=s3.url, **how)
        suite = await entered.__aenter__()
        suites.append(entered)
        bundle = bundles.make(1, **{"ballast.bin": BALLAST, "empty.txt": b"", "small.txt": b"s"})
        await suite.client.push(helpers.packed(bundle))
        cache = BundleCache(tmp_path / f"cache-{len(made)}")
        source = BundleSource(cache, lambda: suite.client.channel, limits=QUICK)
        s3.requests.clear()
        made.append(Fetching(suite, s3, bundle, source, cache))
        return made[-1]

    yield make
    for each in made:
        each.source.close()
        each.cache.close()
    for entered in suites:
        await entered.__aexit__(None, None, None)


@pytest.fixture
async def fetching(make_fetching: Callable[..., Any]) -> Fetching:
    return await make_fetching()


async def test_large_files_come_from_s3_and_the_manager_sends_the_small_ones(
    fetching: Fetching,
) -> None:
    await fetching.source.fetch_description(fetching.bundle.digest)
    assert not fetching.directly
    await fetching.fetch()
    assert [urlsplit(where).path for where in fetching.directly] == [
        f"/bucket/{fetching.ballast_key}"
    ]
    assert not fetching.by_the_manager
    assert not fetching.log
    # Small files are in the manager's memory by now, for the next server that comes.
    fetching.s3.requests.clear()
    await fetching.source.discard(fetching.bundle.digest)
    await fetching.fetch()
    assert len(fetching.s3.requests) == len(fetching.directly) == 1


async def test_who_does_not_accept_urls_gets_the_bytes(fetching: Fetching) -> None:
    got = await fetching.suite.client.download(bundle_sha256=fetching.bundle.digest)
    assert got["ballast.bin"] == BALLAST
    request = pb.DownloadBundleRequest(bundle_sha256=fetching.bundle.digest, accept_urls=True)
    pieces = [piece async for piece in fetching.suite.client.models.DownloadBundle(request)]
    [large] = [piece for piece in pieces if piece.url]
    assert (large.path, large.total_bytes, large.data) == ("ballast.bin", len(BALLAST), b"")
    assert time.time() + 100 < large.expire_time.seconds <= time.time() + 300
    assert pieces[0].path == "manifest.json"


async def test_a_manager_that_is_told_not_to_sends_everything_itself(
    make_fetching: Callable[..., Any],
) -> None:
    fetching = await make_fetching(blobs_direct=False)
    await fetching.fetch()
    assert not fetching.directly
    assert fetching.by_the_manager


async def test_servers_are_sent_to_the_public_endpoint(make_fetching: Callable[..., Any]) -> None:
    fetching = await make_fetching()
    public = f"http://localhost:{urlsplit(fetching.s3.url).port}"
    other = S3Blobs("s3://bucket/pollard", fetching.s3.url, urls=fetching.suite.settings.url_rules)
    rules = ModelsSettings(
        blobs="s3://bucket/pollard", blobs_endpoint=fetching.s3.url, blobs_public_endpoint=public
    ).url_rules
    assert rules is not None
    moved = S3Blobs("s3://bucket/pollard", fetching.s3.url, urls=rules)
    [sha256] = [f.sha256 for f in fetching.bundle.manifest.files if f.path == "ballast.bin"]
    assert other.urls([sha256])[sha256].url.startswith(fetching.s3.url)
    url = moved.urls([sha256])[sha256].url
    assert url.startswith(f"{public}/bucket/")
    taken = bytearray()
    fetch = DirectFetch(QUICK)
    await fetch.fetch(
        RemoteFile("ballast.bin", len(BALLAST), sha256, url), lambda at, data: taken.extend(data)
    )
    fetch.close()
    assert taken == BALLAST


def cut(at: int) -> Callable[..., Any]:
    """The whole length is promised, and not all of it comes."""

    def reply(helpers: Any, content: bytes) -> Any:
        return helpers.Reply(200, [content[:at]], {"Content-Length": str(len(content))})

    return reply


def faults(helpers: Any) -> dict[str, Any]:
    """What S3 may give in place of the file, by the words that tell it."""
    whole = {"Content-Length": str(len(BALLAST))}
    elsewhere = {"Location": "http://169.254.169.254/latest/meta-data/"}
    return {
        "answered 403 (AccessDenied)": 403,
        "answered 500 (InternalError)": 500,
        "answered 404": helpers.Reply(404),
        "answered 302": helpers.Reply(302, [], elsewhere),
        "its SHA-256 is": helpers.Reply(200, [BALLAST[:-1] + b"!"], whole),
        "1 bytes where 3500000 are missing": helpers.Reply(200, [b"x"], {"Content-Length": "1"}),
        "ended after 70000 bytes": helpers.Reply(200, [BALLAST[:70_000]]),
        "answered 416": helpers.Reply(416),
    }


async def test_what_s3_does_not_give_as_it_should_the_manager_sends(
    fetching: Fetching, helpers: Any
) -> None:
    for words, fault in faults(helpers).items():
        fetching.s3.fault = lambda method, where, fault=fault: (
            fault if "X-Amz-Signature" in where else None
        )
        fetching.s3.requests.clear()
        await fetching.fetch()
        assert words in fetching.warned
        assert fetching.s3.url in fetching.warned
        assert fetching.by_the_manager
        assert not list((fetching.cache.root / "tmp").iterdir())
        await fetching.source.discard(fetching.bundle.digest)


async def test_without_keys_or_with_wrong_bytes_everywhere_nothing_wrong_is_taken(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(keys: Any) -> Any:
        raise PermissionError("no keys")

    with monkeypatch.context() as patch:
        patch.setattr(fetching.suite.service.blobs._signer, "sign", fail)
        await fetching.fetch()
    assert fetching.by_the_manager
    await fetching.source.discard(fetching.bundle.digest)
    fetching.s3.client.put_object(
        Bucket="bucket", Key=fetching.ballast_key, Body=BALLAST[:-1] + b"!"
    )
    with pytest.raises(ServiceError) as caught:
        await fetching.source.fetch(fetching.bundle.digest)
    assert "damaged in the store" in str(caught.value)
    assert not fetching.source.cached(fetching.bundle.digest)
    assert not list((fetching.cache.root / "tmp").iterdir())


async def test_a_connection_that_breaks_goes_on_where_it_was(
    fetching: Fetching, helpers: Any
) -> None:
    broken: list[str] = []

    def fault(method: str, where: str) -> Any:
        if "X-Amz-Signature" in where and len(broken) < 2:
            broken.append(where)
            if len(broken) == 1:
                return cut(1_200_000)(helpers, BALLAST)
            return 503
        return None

    fetching.s3.fault = fault
    await fetching.fetch()
    assert len(fetching.directly) == 3
    assert not fetching.by_the_manager


async def test_a_url_whose_time_is_over_is_renewed_and_the_file_goes_on(
    fetching: Fetching, helpers: Any
) -> None:
    first: set[str] = set()
    broken: list[str] = []

    def fault(method: str, where: str) -> Any:
        if not (found := signatures_in(where)):
            return None
        if not first:
            first.update(found)
            return cut(2_100_000)(helpers, BALLAST)
        if found <= first:
            broken.append(where)
            fetching.suite.service.blobs._signer._kept.clear()
            # Signed in another second it is another one.
            time.sleep(1.1)
            return 403
        return None

    fetching.s3.fault = fault
    fetching.source._direct.limits = FetchLimits(pause_seconds=0.01)
    await fetching.fetch()
    assert len(broken) == 1
    assert len(fetching.directly) == 3
    assert not fetching.by_the_manager


async def test_s3_that_is_silent_is_left_for_the_manager(fetching: Fetching) -> None:
    ending = threading.Event()

    def fault(method: str, where: str) -> None:
        if "X-Amz-Signature" in where:
            ending.wait(20)

    fetching.s3.fault = fault
    await fetching.fetch()
    ending.set()
    assert "sent nothing for 1 s" in fetching.warned
    assert fetching.by_the_manager


async def test_drops_without_end_are_left_for_the_manager(fetching: Fetching, helpers: Any) -> None:
    ending = threading.Event()

    def drops() -> Any:
        for at in range(len(BALLAST)):
            if ending.wait(0.1):
                return
            yield BALLAST[at : at + 1]

    fetching.s3.fault = lambda method, where: (
        helpers.Reply(200, drops(), {"Content-Length": str(len(BALLAST))})
        if "X-Amz-Signature" in where
        else None
    )
    await fetching.fetch()
    ending.set()
    assert "bytes within 1 s" in fetching.warned


async def test_a_place_that_is_not_there_is_not_tried_for_each_bundle(
    make_fetching: Callable[..., Any],
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        place = f"http://127.0.0.1:{unused.getsockname()[1]}"
        fetching = await make_fetching(blobs_public_endpoint=place)
        await fetching.fetch()
        assert f"{place} cannot be reached" in fetching.warned
        await fetching.source.discard(fetching.bundle.digest)
        await fetching.fetch()
        assert not fetching.log


async def test_a_full_disk_is_the_servers_own_trouble_and_not_blamed_on_s3(
    fetching: Fetching,
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, before[1]))
    try:
        with structlog.testing.capture_logs() as log, pytest.raises(ServiceError) as caught:
            await fetching.source.fetch(fetching.bundle.digest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.reason == "DISK_FULL"
    assert not [entry for entry in log if "cannot be fetched" in entry["event"]]
    assert len(fetching.directly) == 1
    assert not list((fetching.cache.root / "tmp").iterdir())
    await fetching.fetch()


async def test_a_name_that_nobody_knows_is_said() -> None:
    fetch = DirectFetch(QUICK)
    with pytest.raises(
        DirectFetchFailed, match=r"http://bucket\.invalid cannot be reached"
    ) as caught:
        await fetch.fetch(
            RemoteFile("f", 1, "0" * 64, "http://bucket.invalid/f?X-Amz-Signature=secret"),
            lambda at, data: None,
        )
    assert caught.value.unreachable
    assert "secret" not in caught.value.message
    fetch.close()


async def test_a_fetch_that_is_given_up_leaves_nothing(fetching: Fetching, helpers: Any) -> None:
    begun, ending = threading.Event(), threading.Event()

    def slowly() -> Any:
        yield BALLAST[:1_100_000]
        begun.set()
        ending.wait(20)

    fetching.s3.fault = lambda method, where: (
        helpers.Reply(200, slowly(), {"Content-Length": str(len(BALLAST))})
        if "X-Amz-Signature" in where
        else None
    )
    fetching.source._direct.limits = FetchLimits(piece_seconds=20)
    task = asyncio.create_task(fetching.source.fetch(fetching.bundle.digest))
    await asyncio.to_thread(begun.wait, 20)
    [inner] = fetching.source._fetching.values()
    inner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not list((fetching.cache.root / "tmp").iterdir())
    ending.set()


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://host/x", "http://", "http://[::1", "http://me:pw@host/x", "x"],
)
async def test_what_is_no_address_of_a_server_is_not_opened(url: str) -> None:
    fetch = DirectFetch(QUICK)
    with pytest.raises(DirectFetchFailed) as caught:
        await fetch.fetch(RemoteFile("f", 1, "0" * 64, url), lambda at, data: None)
    assert "pw" not in caught.value.message
    fetch.close()


def test_settings_that_say_nothing_are_refused() -> None:
    for told in (
        {"blobs_public_endpoint": "https://s3.example.org"},
        {"blobs": "s3://bucket", "blobs_public_endpoint": "s3.example.org"},
    ):
        with pytest.raises(StartupError, match="blobs_public_endpoint"):
            ModelsSettings.load(told)


@pytest.mark.parametrize("which", ["blobs_endpoint", "blobs_public_endpoint"])
def test_an_endpoint_without_a_scheme_is_refused_at_once(which: str) -> None:
    with pytest.raises(StartupError, match=f"{which} is a URL.* not 'minio:9000'"):
        ModelsSettings.load({"blobs": "s3://bucket/pollard", which: "minio:9000"})
