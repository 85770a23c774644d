# Made by clients/python/generate_sync.py from _async/aliases.py; change that file instead.
"""Aliases: where they point, and waiting until they have moved."""

from __future__ import annotations

import time

from pollard.client import _channel, _convert
from pollard.client._names import alias_name, request_id_of, revision_name
from pollard.client._quorum import Quorum, quorum_of
from pollard.client._switch import has_moved
from pollard.client._sync import _io
from pollard.client._sync._manager import SERVICE, ManagerClient
from pollard.client.errors import AliasSwitchTimeout, DeadlineExceeded, Unavailable
from pollard.client.types import Alias
from pollard.models.v1 import model_service_pb2

_FIRST_POLL_SECONDS = 0.02
_LAST_POLL_SECONDS = 0.5


class AliasMethods(ManagerClient):
    """Methods of the models client that concern aliases."""

    def alias(self, model: str, alias: str = "production") -> Alias:
        """Get one alias with the state of its switch."""
        request = model_service_pb2.GetAliasRequest(name=alias_name(model, alias))
        response = self._call(f"{SERVICE}/GetAlias", self._stub.GetAlias, request, None)
        return _convert.alias(response.alias)

    def set_alias(
        self,
        model: str,
        alias: str,
        revision: int,
        *,
        etag: str = "",
        request_id: str | None = None,
        allow_signature_change: bool = False,
        quorum: Quorum | None = None,
        wait: bool = True,
        wait_timeout: float = 120.0,
    ) -> Alias:
        """Point an alias at a revision, creating it when needed.

        Every inference server loads the revision beside the old one; only then the routes change.

        Args:
            model: Model name.
            alias: Alias, such as "production".
            revision: Revision number.
            etag: Guards against a change in between; empty for no guard.
            request_id: UUID of the request: the same one again, within a day, is carried out once;
                None makes one up.
            allow_signature_change: Let the inputs differ from the current revision's.
            quorum: How many inference servers are enough, where some refuse the revision: a number
                (2), or a share of those there are (0.5, "2/3", "67%"); None for all. Those that
                refuse it are in the alias's `failures`.
            wait: Whether to wait until the alias has moved or its switch has failed.
            wait_timeout: How long to wait, in seconds.

        Raises:
            NotFound: There is no such model or revision.
            FailedPrecondition: The inputs differ and that was not allowed.
            Aborted: The alias changed in between.
            AliasSwitchFailed: A server, or too many for the quorum, refused the revision; the alias
                stayed where it was.
            AliasSwitchTimeout: The switch had not ended in time; it goes on.
        """
        request = model_service_pb2.SetAliasRequest(
            name=alias_name(model, alias),
            revision=revision,
            etag=etag,
            allow_signature_change=allow_signature_change,
            quorum=quorum_of(quorum),
            request_id=request_id_of(request_id),
        )
        revision_name(model, revision)  # checks the number
        response = self._call(f"{SERVICE}/SetAlias", self._stub.SetAlias, request, None)
        if not wait:
            return _convert.alias(response.alias)
        return self.wait_alias(model, alias, revision, wait_timeout=wait_timeout)

    def rollback(
        self,
        model: str,
        alias: str = "production",
        *,
        etag: str = "",
        request_id: str | None = None,
        quorum: Quorum | None = None,
        wait: bool = True,
        wait_timeout: float = 120.0,
    ) -> Alias:
        """Point an alias back at the revision that it pointed at before.

        Args:
            model: Model name.
            alias: Alias to move.
            etag: Guards against a change in between; empty for no guard.
            request_id: UUID of the request: the same one again, within a day, is carried out once;
                None makes one up.
            quorum: How many inference servers are enough, as for `set_alias`.
            wait: Whether to wait until the alias has moved or its switch has failed.
            wait_timeout: How long to wait, in seconds.

        Raises:
            FailedPrecondition: There is no revision before.
            AliasSwitchFailed: A server refused the revision; the alias stayed where it was.
        """
        request = model_service_pb2.RollbackAliasRequest(
            name=alias_name(model, alias),
            etag=etag,
            quorum=quorum_of(quorum),
            request_id=request_id_of(request_id),
        )
        response = self._call(f"{SERVICE}/RollbackAlias", self._stub.RollbackAlias, request, None)
        found = _convert.alias(response.alias)
        if not wait:
            return found
        return self.wait_alias(
            model, alias, found.pending_revision or found.revision, wait_timeout=wait_timeout
        )

    def wait_alias(
        self, model: str, alias: str, revision: int, *, wait_timeout: float = 120.0
    ) -> Alias:
        """Wait until an alias leads to a revision everywhere, or its switch has failed.

        A manager that is away for a while is waited for, within the same time.

        Raises:
            AliasSwitchFailed: The switch failed, or another one overtook it.
            AliasSwitchTimeout: It had not ended in time; it goes on.
        """
        give_up = time.monotonic() + _channel.checked_timeout(wait_timeout, wait_timeout)
        pause = _FIRST_POLL_SECONDS
        current: Alias | None = None
        while True:
            try:
                current = self.alias(model, alias)
            except (Unavailable, DeadlineExceeded):
                if time.monotonic() >= give_up:
                    raise
            else:
                if has_moved(current, revision):
                    return current
                if time.monotonic() >= give_up:
                    raise AliasSwitchTimeout(
                        f"alias {alias!r} of {model!r} is still {current.state} towards revision "
                        f"{revision} after {wait_timeout:g} s; the switch goes on. See `pollard "
                        f"models show {model}` and `pollard fleet`",
                        alias=alias_name(model, alias),
                        wanted=revision,
                        serving=current.revision,
                    )
            _io.sleep(min(pause, max(0.0, give_up - time.monotonic())))
            pause = min(pause * 1.5, _LAST_POLL_SECONDS)

    def delete_alias(
        self, model: str, alias: str, *, etag: str = "", request_id: str | None = None
    ) -> None:
        """Remove an alias; requests that name it then get NOT_FOUND.

        Args:
            model: Model name.
            alias: Alias to remove.
            etag: Guards against a change in between; empty for no guard.
            request_id: UUID of the request: the same one again, within a day, is carried out once;
                None makes one up.
        """
        request = model_service_pb2.DeleteAliasRequest(
            name=alias_name(model, alias), etag=etag, request_id=request_id_of(request_id)
        )
        self._call(f"{SERVICE}/DeleteAlias", self._stub.DeleteAlias, request, None)
