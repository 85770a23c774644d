"""The registry: bundles in and out, aliases, rollouts, events, what the servers run."""

from __future__ import annotations

from pollard.client import _convert
from pollard.client._async._manager import PAGE
from pollard.client._async.bundles import BundleMethods
from pollard.client._async.rollouts import RolloutMethods
from pollard.client._async.tokens import TokenMethods
from pollard.client.types import Server
from pollard.models.v1 import fleet_service_pb2


class AsyncModelsClient(BundleMethods, RolloutMethods, TokenMethods):
    """Asks the model management server."""

    async def servers(self) -> list[Server]:
        """List the servers that the manager knows, by id, with what they run."""
        return [_convert.server(item) for item in await self._servers()]

    async def _servers(self) -> list[fleet_service_pb2.Server]:
        """List the servers with all that they have counted."""
        servers: list[fleet_service_pb2.Server] = []
        token = ""
        while True:
            request = fleet_service_pb2.ListServersRequest(page_size=PAGE, page_token=token)
            page = await self._call(
                "/pollard.models.v1.FleetService/ListServers",
                self._fleet.ListServers,
                request,
                None,
            )
            servers += page.servers
            token = page.next_page_token
            if not token:
                return servers
