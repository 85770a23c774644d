"""The manager as a visitor of the page has it: the methods of its gRPC services, asked in process.

Whatever holds for a call over gRPC holds here, because it is the same method.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from urllib.parse import quote

from google.protobuf.message import Message

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.auth.callers import OPEN, Caller, calling
from pollard.services.common.auth.errors import RoleMissing
from pollard.services.common.auth.gate import AUTHORIZATION
from pollard.services.common.auth.roles import ACCESS
from pollard.services.models.servicer_fleet import FleetServicer
from pollard.services.models.servicer_models import ModelServicer

M = TypeVar("M", bound=Message)

MODELS = "/pollard.models.v1.ModelService/"
FLEET = "/pollard.models.v1.FleetService/"

PAGE = 100
"""Rows of a table at once."""

_SECONDS = 10.0
"""How long another manager, which leads, may take to answer."""


@dataclass(frozen=True)
class Visitor:
    """Who looks at the page."""

    peer: str
    """Address, as gRPC names peers: "ipv4:10.0.0.7:41234"."""
    csrf: str
    """What a form of this visitor has to bring with it."""
    caller: Caller = OPEN
    """Who that is; everybody where nobody has to sign in."""
    authorization: str = field(default="", repr=False)
    """What other services are shown in the visitor's name."""
    in_session: bool = False
    """Whether the visitor has signed in here, and may sign out."""

    @property
    def name(self) -> str:
        """Who has signed in; empty where nobody has to."""
        return self.caller.name

    def may(self, method: str) -> bool:
        """Tell whether the visitor may call a method, by its full name."""
        access = ACCESS.get(method)
        return access is not None and access.allows(self.caller)

    def metadata(self) -> Sequence[tuple[str, str]]:
        """Return what calls to other services carry."""
        return ((AUTHORIZATION, self.authorization),) if self.authorization else ()

    def may_change(self) -> bool:
        """Tell whether the visitor may move aliases and run rollouts."""
        return self.may(MODELS + "CreateRollout")

    def request_id(self, *about: object) -> str:
        """Return the same UUID for the same wish: a form that is sent twice is one request."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, "\n".join([self.csrf, *map(str, about)])))


class _Context:
    """What the methods ask of their call, answered for a visitor."""

    def __init__(self, visitor: Visitor) -> None:
        self._visitor = visitor

    def peer(self) -> str:
        # The audit log has who has signed in, rather than from where.
        return quote(self._visitor.caller.actor) or self._visitor.peer

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return self._visitor.metadata()

    def time_remaining(self) -> float:
        return _SECONDS


class Manager:
    """Asks the servicers of this process for a visitor."""

    def __init__(self, models: ModelServicer, fleet: FleetServicer, visitor: Visitor) -> None:
        self._models = models
        self._fleet = fleet
        self.visitor = visitor

    async def ask(self, method: str, request: Message, kind: type[M]) -> M:
        """Call a method of ModelService.

        Raises:
            RoleMissing: the visitor may not.
            ServiceError: what the method says.
        """
        self._check(MODELS + method)
        # One of ours; the methods ask no more of it than it has.
        context = cast(Any, _Context(self.visitor))
        with calling(self.visitor.caller):
            answer = await getattr(self._models, method)(request, context)
        return cast(M, answer)

    async def servers(self) -> list[fleet_pb.Server]:
        """Return every server of the fleet."""
        self._check(FLEET + "ListServers")
        context = cast(Any, _Context(self.visitor))
        found: list[fleet_pb.Server] = []
        token = ""
        while True:
            request = fleet_pb.ListServersRequest(page_size=1000, page_token=token)
            with calling(self.visitor.caller):
                answer = await self._fleet.ListServers(request, context)
            found.extend(answer.servers)
            token = answer.next_page_token
            if not token:
                return found

    def _check(self, method: str) -> None:
        if not self.visitor.may(method):
            caller, access = self.visitor.caller, ACCESS.get(method)
            needed = access.words if access is not None else "another"
            raise RoleMissing(
                f"{caller.name} has the role {caller.role.value}, and "
                f"{method.rpartition('/')[2]} needs {needed}",
                method=method,
                role=caller.role.value,
                needed=needed,
            )

    async def model(self, model: str) -> pb.Model:
        """Return one model."""
        request = pb.GetModelRequest(name=f"models/{model}")
        return (await self.ask("GetModel", request, pb.GetModelResponse)).model

    async def revision(self, model: str, target: int | str) -> pb.Revision:
        """Return a revision with its manifest, by its number or by an alias."""
        part = "revisions" if isinstance(target, int) else "aliases"
        request = pb.GetRevisionRequest(name=f"models/{model}/{part}/{target}")
        return (await self.ask("GetRevision", request, pb.GetRevisionResponse)).revision

    async def rollout(self, model: str, number: int) -> pb.Rollout:
        """Return a rollout with its evidence."""
        request = pb.GetRolloutRequest(name=f"models/{model}/rollouts/{number}")
        return (await self.ask("GetRollout", request, pb.GetRolloutResponse)).rollout

    async def rollouts(self, model: str, most: int) -> list[pb.Rollout]:
        """Return the newest rollouts of a model."""
        request = pb.ListRolloutsRequest(parent=f"models/{model}", page_size=most)
        return list((await self.ask("ListRollouts", request, pb.ListRolloutsResponse)).rollouts)

    async def events(
        self, model: str = "", *, most: int = PAGE, token: str = ""
    ) -> pb.ListEventsResponse:
        """Return the newest events, of one model or of all."""
        name = f"models/{model}" if model else ""
        request = pb.ListEventsRequest(page_size=most, page_token=token, model=name)
        return await self.ask("ListEvents", request, pb.ListEventsResponse)
