"""A client that goes is noticed, however much of what it sent is unread."""

import asyncio

import pytest

from pollard.services.inference.frontends.receiving import ReadAhead


def body(size: int, more: bool = True) -> dict[str, object]:
    return {"type": "http.request", "body": bytes(size), "more_body": more}


GONE = {"type": "http.disconnect"}


class Sent:
    """What a client sends, and how much of it has been taken."""

    def __init__(self, *events: dict[str, object], error: Exception | None = None) -> None:
        self._events = list(events)
        self._error = error
        self.taken = 0

    async def receive(self) -> dict[str, object]:
        if self.taken < len(self._events):
            self.taken += 1
            return self._events[self.taken - 1]
        if self._error is not None:
            raise self._error
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize(
    "sent",
    [
        Sent(*[body(10)] * 5, GONE),
        Sent(body(10), body(0, more=False), GONE),
        Sent(*[body(10)] * 5, error=ConnectionError()),
    ],
)
async def test_a_client_that_goes_is_noticed_before_what_it_sent_is_read(sent) -> None:
    async def call() -> None:
        ahead = ReadAhead(sent.receive)
        try:
            assert (await ahead.receive())["body"] == bytes(10)
            await asyncio.Event().wait()
        finally:
            ahead.stop()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.ensure_future(call()), 10)


async def test_what_is_read_ahead_is_bounded_and_comes_in_order() -> None:
    sent = Sent(*(body(size) for size in range(1, 101)), body(0, more=False))
    ahead = ReadAhead(sent.receive, limit=100)
    for _ in range(100):  # turns of the loop, of which each event needs one: no time counts
        await asyncio.sleep(0)
    assert sent.taken == 14  # 1 + 2 + … + 14 is the first sum that is at least 100.
    sizes = []
    while (event := await ahead.receive())["more_body"]:
        sizes.append(len(event["body"]))
        await asyncio.sleep(0)
    assert sizes == list(range(1, 101))
    ahead.stop()
