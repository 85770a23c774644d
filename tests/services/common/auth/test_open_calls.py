"""Calls that last end with their callers' tokens, whenever the end comes."""

from __future__ import annotations

import asyncio
import time

import pytest

from pollard.services.common.auth.callers import Caller, Role
from pollard.services.common.auth.open_calls import OpenCalls
from pollard.services.common.errors import ServiceError

ANNA = Caller("anna", Role.PREDICTOR, "token", "token:1")
BEN = Caller("ben", Role.PREDICTOR, "token", "token:2")


class Known:
    """Who is known; the others were let in before."""

    def __init__(self) -> None:
        self.revoked: set[str] = set()

    def ended(self, caller: Caller) -> ServiceError | None:
        if caller.key in self.revoked:
            return ServiceError(f"{caller.name} was revoked", reason="TOKEN_REVOKED")
        if caller.expires is not None and time.time() >= caller.expires:
            return ServiceError(f"the token of {caller.name} has expired", reason="TOKEN_EXPIRED")
        return None


@pytest.fixture
def known() -> Known:
    return Known()


@pytest.fixture
def calls(known: Known) -> OpenCalls:
    return OpenCalls(known.ended)


async def test_a_revocation_ends_the_calls_of_that_caller_only(
    known: Known, calls: OpenCalls
) -> None:
    begun = asyncio.Barrier(3)

    async def call(caller: Caller, over: asyncio.Event) -> None:
        async with calls.lasting(caller):
            await begun.wait()
            await over.wait()

    over = asyncio.Event()
    anna, ben = (asyncio.create_task(call(who, over)) for who in (ANNA, BEN))
    await begun.wait()
    known.revoked.add(ANNA.key)
    # News of revocations comes from another thread.
    await asyncio.to_thread(calls.check)
    with pytest.raises(ServiceError, match="anna was revoked"):
        await anna
    assert not ben.done()
    over.set()
    await ben


async def test_a_revocation_between_the_gate_and_the_call_ends_it_too(
    known: Known, calls: OpenCalls
) -> None:
    # The gate has let the caller in, and every open call was looked at before this one was one.
    known.revoked.add(ANNA.key)
    calls.check()
    entered = False
    with pytest.raises(ServiceError, match="anna was revoked"):
        async with calls.lasting(ANNA):
            entered = True
    assert not entered
    assert not calls._open


async def test_a_call_ends_when_its_token_expires(calls: OpenCalls) -> None:
    brief = Caller("anna", Role.PREDICTOR, "token", "token:1", expires=time.time() + 0.3)
    with pytest.raises(ServiceError, match="has expired"):
        async with calls.lasting(brief):
            await asyncio.Event().wait()
    assert not calls._open


async def test_a_client_that_goes_is_no_end_of_a_token(calls: OpenCalls) -> None:
    begun = asyncio.Event()

    async def call() -> None:
        async with calls.lasting(ANNA):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not calls._open


async def test_a_call_that_has_ended_is_not_cancelled_later(known: Known, calls: OpenCalls) -> None:
    async with calls.lasting(ANNA):
        known.revoked.add(ANNA.key)
        # Seen while the call is about to end: the word of it comes afterwards.
        calls.check()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
