"""Keeping a manager's own gate, and the fleet's servers, at what the registry says of tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.services.common.auth import Gate
from pollard.services.common.auth.wire import table_of
from pollard.services.common.errors import ServiceError
from pollard.services.common.lifecycle import cancel
from pollard.services.models import tokens
from pollard.services.models.store import Store

POLL_SECONDS = 1.0
"""How often a database that is shared is asked whether another manager has changed the tokens."""

_log = structlog.get_logger("pollard.auth")


class AccessKeeper:
    """Reads the tokens whenever they change, and tells who must know."""

    def __init__(
        self, store: Store, gate: Gate, told: Callable[[fleet_pb.AccessList], None]
    ) -> None:
        """Tell `gate`, and the fleet by `told`."""
        self._store, self._gate, self._told = store, gate, told
        self._version = -1
        self._task: asyncio.Task[Any] | None = None

    async def start(self, initial: Path | None) -> None:
        """Let the first tokens in, if tokens count here, and read what there is.

        Raises:
            StartupError: the files of the first tokens cannot be used.
        """
        if initial is not None:
            made = await self._store.write(lambda session: tokens.take_initial(session, initial))
            for path in made:
                _log.warning("a first token was made; keep its file to yourself", file=str(path))
        await self.refresh()
        if self._store.database.shared:
            self._task = asyncio.create_task(self._follow(), name="access")

    async def stop(self) -> None:
        """Read no more."""
        await cancel(self._task)

    async def refresh(self) -> None:
        """Look whether the tokens have changed; whoever must know is told before this returns."""
        version = await self._store.read(tokens.access_version)
        if version == self._version:
            return
        access = await self._store.read(tokens.access_list)
        self._version = access.version
        self._gate.know(table_of(access))
        self._told(access)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.refresh()
            except ServiceError as error:
                _log.warning("the tokens cannot be read; going on with those known", why=str(error))
