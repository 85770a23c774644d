"""The rollout methods of ModelService over gRPC."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf.message import Message
from sqlalchemy.orm import Session

from pollard.models.v1 import model_service_pb2 as pb
from pollard.models.v1 import model_service_pb2_grpc as pb_grpc
from pollard.services.common.auth import current_caller
from pollard.services.models import (
    aliases,
    encode,
    events,
    names,
    rollout_shadow,
    rollout_words,
    rollouts,
)
from pollard.services.models.fleet import Fleet
from pollard.services.models.quorum import Quorum
from pollard.services.models.signatures import SignaturePolicy
from pollard.services.models.store import Store

M = TypeVar("M", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]


class RolloutMethods(pb_grpc.ModelServiceServicer):
    """The part of ModelService that is about rollouts, and what all of its changes share."""

    def __init__(self, store: Store, fleet: Fleet, policy: SignaturePolicy) -> None:
        self._store = store
        self._fleet = fleet
        self._policy = policy

    async def CreateRollout(
        self, request: pb.CreateRolloutRequest, context: Context
    ) -> pb.CreateRolloutResponse:
        """Begin a rollout; it goes on by itself."""
        model = names.parse_model(request.parent, "parent")
        plan = _decode_plan(request.rollout)
        by = actor(context)
        shadow: rollouts.Shadow | None = None

        def work(session: Session) -> pb.CreateRolloutResponse:
            self._policy.check_served(session, model, plan.revision)
            row = rollouts.create(session, model, plan, shadow, actor=by)
            return pb.CreateRolloutResponse(rollout=encode.rollout(row))

        if plan.shadow_percent:
            shadow = await self._compare(model, plan)
        return await self._change("CreateRollout", request, work, pb.CreateRolloutResponse)

    async def _compare(self, model: str, plan: rollouts.Plan) -> rollouts.Shadow | None:
        """Look how the answers of two revisions can be compared; None if there is no base one."""
        number = await self._store.read(
            lambda session: aliases.find_alias(session, model, plan.alias).revision
        )
        if not number or number == plan.revision:
            return None  # which is refused with its own words
        new, base = await self._revision(model, plan.revision), await self._revision(model, number)
        how = rollout_shadow.compare(
            plan.revision, new.manifest, number, base.manifest, plan.min_agreement
        )
        return rollouts.Shadow(number, how)

    @abc.abstractmethod
    async def _revision(self, model: str, target: int | str) -> pb.Revision:
        """Return a revision with its manifest."""

    async def GetRollout(
        self, request: pb.GetRolloutRequest, context: Context
    ) -> pb.GetRolloutResponse:
        """Get one rollout."""
        model, number = names.parse_rollout(request.name)

        def work(session: Session) -> pb.Rollout:
            row = rollouts.find(session, model, number)
            found = encode.rollout(row)
            evidence = rollout_words.describe(session, row)
            if evidence is not None:
                found.evidence.CopyFrom(evidence)
            return found

        return pb.GetRolloutResponse(rollout=await self._store.read(work))

    async def ListRollouts(
        self, request: pb.ListRolloutsRequest, context: Context
    ) -> pb.ListRolloutsResponse:
        """List the rollouts of a model, or of all, the newest of each first."""
        everything = request.parent == "models/-"
        model = None if everything else names.parse_model(request.parent, "parent")

        def work(session: Session) -> pb.ListRolloutsResponse:
            found, token = rollouts.list_rollouts(
                session,
                model,
                running_only=request.running_only,
                page_size=request.page_size,
                page_token=request.page_token,
            )
            return pb.ListRolloutsResponse(
                rollouts=[encode.rollout(row) for row in found], next_page_token=token
            )

        return await self._store.read(work)

    async def PauseRollout(
        self, request: pb.PauseRolloutRequest, context: Context
    ) -> pb.PauseRolloutResponse:
        """Keep a rollout at its step."""
        model, number = names.parse_rollout(request.name)
        by = actor(context)

        def work(session: Session) -> pb.PauseRolloutResponse:
            row = rollouts.pause(session, model, number, etag=request.etag, actor=by)
            return pb.PauseRolloutResponse(rollout=encode.rollout(row))

        return await self._change("PauseRollout", request, work, pb.PauseRolloutResponse)

    async def ResumeRollout(
        self, request: pb.ResumeRolloutRequest, context: Context
    ) -> pb.ResumeRolloutResponse:
        """Go on with a paused rollout."""
        model, number = names.parse_rollout(request.name)
        by = actor(context)

        def work(session: Session) -> pb.ResumeRolloutResponse:
            row = rollouts.resume(session, model, number, etag=request.etag, actor=by)
            return pb.ResumeRolloutResponse(rollout=encode.rollout(row))

        return await self._change("ResumeRollout", request, work, pb.ResumeRolloutResponse)

    async def PromoteRollout(
        self, request: pb.PromoteRolloutRequest, context: Context
    ) -> pb.PromoteRolloutResponse:
        """Send all requests to the revision."""
        model, number = names.parse_rollout(request.name)
        by = actor(context)

        def work(session: Session) -> pb.PromoteRolloutResponse:
            row = rollouts.promote(session, model, number, etag=request.etag, actor=by)
            return pb.PromoteRolloutResponse(rollout=encode.rollout(row))

        return await self._change("PromoteRollout", request, work, pb.PromoteRolloutResponse)

    async def AbortRollout(
        self, request: pb.AbortRolloutRequest, context: Context
    ) -> pb.AbortRolloutResponse:
        """Send all requests to the revision before."""
        model, number = names.parse_rollout(request.name)
        by = actor(context)

        def work(session: Session) -> pb.AbortRolloutResponse:
            row = rollouts.abort(session, model, number, etag=request.etag, actor=by)
            return pb.AbortRolloutResponse(rollout=encode.rollout(row))

        return await self._change("AbortRollout", request, work, pb.AbortRolloutResponse)

    async def _change(
        self, method: str, request: Message, work: Callable[[Session], M], kind: type[M]
    ) -> M:
        """Carry out a change once for its request id, and let the fleet look at it."""
        request_id: str = request.request_id  # type: ignore[attr-defined]  # every caller's has it
        response = await self._store.write(
            lambda session: events.once(
                session, method, request, request_id, lambda: work(session), kind
            )
        )
        self._fleet.poke()
        return response


def actor(context: Context) -> str:
    """Return who asks; where nobody has to show anything, that is the peer's address."""
    known = current_caller().actor
    if known:
        return known[:255]
    peer = unquote(context.peer())
    if peer.startswith(("ipv4:", "ipv6:")):
        peer = peer.rpartition(":")[0]
    return peer[:255]


def _decode_plan(message: pb.Rollout) -> rollouts.Plan:
    gates = message.gates
    hold = rollouts.DEFAULT_HOLD_SECONDS
    if message.HasField("hold"):
        hold = message.hold.seconds + message.hold.nanos / 1e9
    return rollouts.Plan(
        alias=names.check_alias_id(message.alias or "production", "rollout.alias"),
        revision=names.check_number(str(message.revision), "rollout.revision"),
        steps=tuple(message.steps) or rollouts.DEFAULT_STEPS,
        hold_seconds=hold,
        min_requests=gates.min_requests or rollouts.DEFAULT_MIN_REQUESTS,
        max_error_rate=gates.max_error_rate or rollouts.DEFAULT_MAX_ERROR_RATE,
        max_p99_ratio=gates.max_p99_ratio or rollouts.DEFAULT_MAX_P99_RATIO,
        shadow_percent=message.shadow_percent,
        min_agreement=gates.min_agreement if gates.HasField("min_agreement") else None,
        quorum=Quorum.decode(message.quorum) if message.HasField("quorum") else None,
    )
