"""Messages are taken apart however the body of a call was cut into pieces."""

from __future__ import annotations

import gzip

import pytest

from pollard.services.inference.errors import RequestInvalid
from pollard.services.inference.frontends.framing import (
    CallerGone,
    Messages,
    MessageTooLarge,
    frame,
    seconds_of,
)

LIMIT = 100


def messages(*parts: bytes, encoding: bytes = b"", gone: bool = False) -> Messages:
    """The messages of a body that comes in these parts; the client may go after them."""
    events = [
        {"type": "http.request", "body": part, "more_body": gone or number < len(parts)}
        for number, part in enumerate(parts, start=1)
    ]
    if gone:
        events.append({"type": "http.disconnect"})
    coming = iter(events)

    async def receive() -> dict[str, object]:
        return next(coming)

    return Messages(receive, encoding, LIMIT)


def cut(body: bytes, size: int) -> list[bytes]:
    return [body[start : start + size] for start in range(0, len(body), size)]


@pytest.mark.parametrize("size", [1, 2, 5, 7, 64, 10_000])
async def test_every_message_comes_whole_and_in_order(size) -> None:
    sent = [b"", b"a", b"b" * LIMIT, b"", b"c" * 50, *(bytes([n]) * n for n in range(100))]
    body = b"".join(map(frame, sent))
    assert [each async for each in messages(*cut(body, size)).each()] == sent
    # An empty last part says that there is no more.
    assert [each async for each in messages(*cut(body, size), b"").each()] == sent
    for message in (b"", b"a", b"b" * LIMIT):
        assert await messages(*cut(frame(message), size), b"").only() == message


async def test_many_small_messages_at_once_are_no_large_one() -> None:
    sent = [b"x" * 10] * 1000
    body = b"".join(map(frame, sent))
    assert len(body) > 100 * LIMIT
    assert [each async for each in messages(body).each()] == sent


@pytest.mark.parametrize("parts", [[frame(b"x" * (LIMIT + 1))], [frame(b"x" * 10_000)[:50]]])
async def test_a_large_message_is_refused_before_all_of_it_has_come(parts) -> None:
    with pytest.raises(MessageTooLarge, match="limit of 100"):
        [each async for each in messages(frame(b"a") + parts[0], gone=True).each()]
    with pytest.raises(MessageTooLarge):
        await messages(frame(b"x" * 10_000)[:200], gone=True).only()


async def test_a_small_message_that_unpacks_to_a_large_one_is_refused() -> None:
    packed = frame(gzip.compress(bytes(LIMIT + 1)))
    with pytest.raises(MessageTooLarge):
        await messages(b"\1" + packed[1:], encoding=b"gzip").only()
    packed = frame(gzip.compress(bytes(LIMIT)))
    assert await messages(b"\1" + packed[1:], encoding=b"gzip").only() == bytes(LIMIT)


@pytest.mark.parametrize("body", [b"\0", frame(b"abc")[:-1], frame(b"abc") + b"\0\0"])
async def test_what_ends_within_a_message_is_refused(body) -> None:
    with pytest.raises(RequestInvalid, match="ends within a message"):
        [each async for each in messages(body).each()]
    with pytest.raises(RequestInvalid, match="exactly one whole message"):
        await messages(body).only()


async def test_a_client_that_goes_is_gone() -> None:
    with pytest.raises(CallerGone):
        [each async for each in messages(frame(b"a"), gone=True).each()]
    with pytest.raises(CallerGone):
        await messages(frame(b"a"), gone=True).only()


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [(b"1S", 1), (b"100m", 0.1), (b"2H", 7200), (b"00000005M", 300), (b"99999999n", 0.099999999)],
)
def test_timeouts_in_every_unit(timeout, seconds) -> None:
    assert seconds_of(timeout) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "timeout", [b"", b"S", b"1", b"-1S", b"1.5S", b"1s", b"123456789S", b"9" * 400 + b"H"]
)
def test_malformed_timeouts_are_none(timeout) -> None:
    assert seconds_of(timeout) is None
