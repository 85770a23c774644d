"""The registry: bundles in and out, aliases, rollouts, events, what the servers run."""

from __future__ import annotations

from pollard.client import _convert
from pollard.client._async._manager import PAGE, SERVICE
from pollard.client._async.bundles import BundleMethods
from pollard.client._async.rollouts import RolloutMethods
from pollard.client._names import model_name
from pollard.client.types import Event, Server
from pollard.models.v1 import fleet_service_pb2, model_service_pb2


class AsyncModelsClient(BundleMethods, RolloutMethods):
    """Asks the model management server."""

    async def events(self, model: str | None = None, *, limit: int = 50) -> list[Event]:
        """List the newest changes in the registry, at most 1000, newest first."""
        if not 1 <= limit <= 1000:
            raise ValueError(f"limit must be 1 to 1000, not {limit}")
        request = model_service_pb2.ListEventsRequest(
            page_size=limit, model="" if model is None else model_name(model)
        )
        response = await self._call(f"{SERVICE}/ListEvents", self._stub.ListEvents, request, None)
        return [_convert.event(item) for item in response.events]

    async def servers(self) -> list[Server]:
        """List the servers that the manager knows, by id, with what they run."""
        servers: list[Server] = []
        token = ""
        while True:
            request = fleet_service_pb2.ListServersRequest(page_size=PAGE, page_token=token)
            page = await self._call(
                "/pollard.models.v1.FleetService/ListServers",
                self._fleet.ListServers,
                request,
                None,
            )
            servers += [_convert.server(item) for item in page.servers]
            token = page.next_page_token
            if not token:
                return servers
