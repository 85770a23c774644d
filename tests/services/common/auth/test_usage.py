"""How much a caller may use."""

from __future__ import annotations

import pytest

from pollard.services.common.auth import OPEN, Caller, Limits, Role
from pollard.services.common.auth.errors import LimitReached
from pollard.services.common.auth.usage import UsageBook
from pollard.services.common.status import describe


class Clock:
    """Time that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock) -> UsageBook:
    return UsageBook(clock)


def caller(name: str = "a", **limits: float) -> Caller:
    return Caller(name, Role.PREDICTOR, "token", f"token:{name}", limits=Limits(**limits))


def test_a_bucket_gives_the_rate_over_time_and_a_burst_at_once(book, clock) -> None:
    who = caller(requests_per_second=10, burst=3)
    for _ in range(3):
        book.enter(who).close()
    with pytest.raises(LimitReached) as caught:
        book.enter(who)
    assert caught.value.reason == "RATE_LIMIT"
    assert caught.value.retry_seconds == pytest.approx(0.1)
    clock.now += 0.1
    book.enter(who).close()
    with pytest.raises(LimitReached):
        book.enter(who)
    clock.now += 3600
    for _ in range(3):
        book.enter(who).close()
    with pytest.raises(LimitReached):
        book.enter(who)


def test_what_is_refused_does_not_cost_the_caller_anything(book, clock) -> None:
    who = caller(requests_per_second=1, burst=1)
    book.enter(who).close()
    for _ in range(100):
        with pytest.raises(LimitReached):
            book.enter(who)
    clock.now += 1
    book.enter(who).close()


def test_only_so_many_are_in_flight(book) -> None:
    who = caller(concurrent_requests=2)
    first, second = book.enter(who), book.enter(who)
    with pytest.raises(LimitReached) as caught:
        book.enter(who)
    assert caught.value.reason == "CONCURRENCY_LIMIT"
    first.close()
    first.close()  # once is enough
    third = book.enter(who)
    with pytest.raises(LimitReached):
        book.enter(who)
    second.close()
    third.close()


def test_streams_are_counted_by_themselves(book) -> None:
    who = caller(streams=1)
    with book.enter(who, stream=True):
        with pytest.raises(LimitReached) as caught:
            book.enter(who, stream=True)
        assert caught.value.reason == "STREAM_LIMIT"
        book.enter(who).close()
    book.enter(who, stream=True).close()


def test_callers_do_not_take_from_each_other(book) -> None:
    one, other = caller("one", requests_per_second=1, burst=1), caller("two", concurrent_requests=1)
    book.enter(one).close()
    with book.enter(other), pytest.raises(LimitReached):
        book.enter(one)


def test_messages_of_a_stream_are_slowed(book, clock) -> None:
    who = caller(requests_per_second=10, burst=2)
    with book.enter(who, stream=True) as lease:
        waits = [lease.pause() for _ in range(4)]
    assert waits == pytest.approx([0.0, 0.1, 0.2, 0.3])
    clock.now += 10
    assert book.pause(who) == 0.0


def test_large_messages_are_refused(book) -> None:
    with book.enter(caller(message_bytes=10)) as lease:
        lease.check_size(10)
        with pytest.raises(LimitReached, match="11 bytes"):
            lease.check_size(11)


def test_who_has_no_limits_is_not_counted(book) -> None:
    for _ in range(1000):
        book.enter(OPEN)


def test_the_status_says_when_to_try_again(book) -> None:
    who = caller(requests_per_second=2, burst=1)
    book.enter(who).close()
    with pytest.raises(LimitReached) as caught:
        book.enter(who)
    outcome = describe(caught.value)
    status = outcome.to_proto()
    assert outcome.code.name == "RESOURCE_EXHAUSTED"
    assert [detail.TypeName() for detail in status.details] == [
        "google.rpc.ErrorInfo",
        "google.rpc.RetryInfo",
    ]
