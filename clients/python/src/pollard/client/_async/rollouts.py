"""Rollouts: the way of an alias to a revision in steps, with gates."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from pollard.client import _convert
from pollard.client._async._manager import PAGE, SERVICE
from pollard.client._async.events import EventMethods
from pollard.client._names import (
    checked_alias,
    model_name,
    request_id_of,
    revision_name,
    rollout_name,
)
from pollard.client._quorum import Quorum, quorum_of
from pollard.client.errors import RequestFailed
from pollard.client.types import Rollout
from pollard.models.v1 import model_service_pb2


class RolloutMethods(EventMethods):
    """Methods of the models client that concern rollouts."""

    async def start_rollout(
        self,
        model: str,
        revision: int,
        *,
        alias: str = "production",
        steps: Sequence[float] = (),
        hold: float | None = None,
        min_requests: int = 0,
        max_error_rate: float = 0.0,
        max_p99_ratio: float = 0.0,
        shadow_percent: float = 0.0,
        min_agreement: float | None = None,
        quorum: Quorum | None = None,
        request_id: str | None = None,
    ) -> Rollout:
        """Move an alias to a revision in steps; the manager takes it back when it is worse.

        Args:
            model: Model name.
            revision: Revision to move to.
            alias: Alias that moves.
            steps: Growing shares in percent, the last 100; empty for 5, 25, 50, 100.
            hold: Seconds that each step lasts at least; None for 60.
            min_requests: Requests to the revision that each step must have seen; 0 for 200.
            max_error_rate: Largest rate of failed requests, 0 to 1; 0 for 0.005.
            max_p99_ratio: Largest ratio of the 99th percentiles of the latency; 0 for 1.2.
            shadow_percent: Share of requests also sent as shadows; 0 for none.
            min_agreement: Smallest share of the shadows' items whose first answer agrees, 0 to 1;
                0 judges none, None takes what the bundle says, less 0.02.
            quorum: How many inference servers are enough, where some refuse the revision, as for
                `set_alias`; None for all. Those that refuse it are in the rollout's `failures`.
            request_id: UUID of the request: the same one again, within a day, is carried out once;
                None makes one up.

        Raises:
            InvalidArgument: A value is out of its range.
            NotFound: There is no such model, alias or revision.
            FailedPrecondition: The alias is moved already or leads there, the inputs differ, or
                shadows cannot be compared or judged.
        """
        revision_name(model, revision)  # checks the number
        rollout = model_service_pb2.Rollout(
            alias=checked_alias(alias),
            revision=revision,
            steps=steps,
            shadow_percent=shadow_percent,
            quorum=quorum_of(quorum),
            gates=model_service_pb2.RolloutGates(
                min_requests=min_requests,
                max_error_rate=max_error_rate,
                max_p99_ratio=max_p99_ratio,
                min_agreement=min_agreement,
            ),
        )
        if hold is not None:
            rollout.hold.FromMicroseconds(round(hold * 1e6))
        request = model_service_pb2.CreateRolloutRequest(
            parent=model_name(model), rollout=rollout, request_id=request_id_of(request_id)
        )
        response = await self._call(
            f"{SERVICE}/CreateRollout", self._stub.CreateRollout, request, None
        )
        return _convert.rollout(response.rollout)

    async def rollout(self, model: str, rollout: int) -> Rollout:
        """Get one rollout with what its step has seen. Raises NotFound when there is none."""
        request = model_service_pb2.GetRolloutRequest(name=rollout_name(model, rollout))
        response = await self._call(f"{SERVICE}/GetRollout", self._stub.GetRollout, request, None)
        return _convert.rollout(response.rollout)

    async def rollouts(
        self, model: str | None = None, *, running_only: bool = False
    ) -> list[Rollout]:
        """List the rollouts of a model, newest first.

        Args:
            model: Model name; None for all models, in the order of their names.
            running_only: Leave out those that have ended.
        """
        rollouts: list[Rollout] = []
        token = ""
        while True:
            request = model_service_pb2.ListRolloutsRequest(
                parent="models/-" if model is None else model_name(model),
                running_only=running_only,
                page_size=PAGE,
                page_token=token,
            )
            page = await self._call(
                f"{SERVICE}/ListRollouts", self._stub.ListRollouts, request, None
            )
            found = [_convert.rollout(item) for item in page.rollouts]
            # An older manager gives all of them.
            rollouts += [each for each in found if not (running_only and each.end_time)]
            token = page.next_page_token
            if not token:
                return rollouts

    async def watch_rollout(
        self,
        model: str,
        rollout: int,
        *,
        patience: float | None = None,
        on_connection: Callable[[RequestFailed | None], None] | None = None,
    ) -> AsyncGenerator[Rollout, None]:
        """Yield a rollout as it is, and again with every step, until it has ended.

        A connection that breaks is made again, as for `watch_events`; what changed meanwhile comes
        as one change.

        Args:
            model: Model name.
            rollout: Number of the rollout.
            patience: As for `watch_events`.
            on_connection: As for `watch_events`.

        Raises:
            NotFound: There is no such model or rollout.
            Unavailable: The manager could not be reached at the beginning, or not within
                `patience`.
        """
        # Events are watched from before the first look on, so that no change falls between the two.
        newest = await self.events(limit=1)
        current = await self.rollout(model, rollout)
        yield current
        if current.end_time is not None:
            return
        name = rollout_name(model, rollout)
        start = newest[0].sequence + 1 if newest else 1
        events = self.watch_events(
            model, start=start, patience=patience, on_connection=on_connection
        )
        async with aclosing(events):  # so that its call ends with this watch, and not some time
            async for event in events:
                if event.resource != name:
                    continue
                after = await self.rollout(model, rollout)
                if (after.state, after.step) == (current.state, current.step):
                    continue
                current = after
                yield current
                if current.end_time is not None:
                    return

    async def pause_rollout(
        self, model: str, rollout: int, *, etag: str = "", request_id: str | None = None
    ) -> Rollout:
        """Keep a rollout at its step; it is still taken back when it is worse.

        Args:
            model: Model name.
            rollout: Number of the rollout.
            etag: Guards against a change in between; empty for no guard.
            request_id: UUID of the request: the same one again, within a day, is carried out once;
                None makes one up.

        Raises:
            NotFound: There is no such rollout.
            FailedPrecondition: It has ended.
            Aborted: It changed in between.
        """
        request = model_service_pb2.PauseRolloutRequest(
            name=rollout_name(model, rollout), etag=etag, request_id=request_id_of(request_id)
        )
        response = await self._call(
            f"{SERVICE}/PauseRollout", self._stub.PauseRollout, request, None
        )
        return _convert.rollout(response.rollout)

    async def resume_rollout(
        self, model: str, rollout: int, *, etag: str = "", request_id: str | None = None
    ) -> Rollout:
        """Go on with a paused rollout. Takes and raises as `pause_rollout`."""
        request = model_service_pb2.ResumeRolloutRequest(
            name=rollout_name(model, rollout), etag=etag, request_id=request_id_of(request_id)
        )
        response = await self._call(
            f"{SERVICE}/ResumeRollout", self._stub.ResumeRollout, request, None
        )
        return _convert.rollout(response.rollout)

    async def promote_rollout(
        self, model: str, rollout: int, *, etag: str = "", request_id: str | None = None
    ) -> Rollout:
        """End a rollout at 100 % now. Takes and raises as `pause_rollout`."""
        request = model_service_pb2.PromoteRolloutRequest(
            name=rollout_name(model, rollout), etag=etag, request_id=request_id_of(request_id)
        )
        response = await self._call(
            f"{SERVICE}/PromoteRollout", self._stub.PromoteRollout, request, None
        )
        return _convert.rollout(response.rollout)

    async def abort_rollout(
        self, model: str, rollout: int, *, etag: str = "", request_id: str | None = None
    ) -> Rollout:
        """End a rollout; all requests go to the revision before.

        Takes and raises as `pause_rollout`.
        """
        request = model_service_pb2.AbortRolloutRequest(
            name=rollout_name(model, rollout), etag=etag, request_id=request_id_of(request_id)
        )
        response = await self._call(
            f"{SERVICE}/AbortRollout", self._stub.AbortRollout, request, None
        )
        return _convert.rollout(response.rollout)
