# Made by clients/python/generate_sync.py from _async/tokens.py; change that file instead.
"""Tokens: made, listed, ended; and who this client is."""

from __future__ import annotations

from pollard.client import _tokens
from pollard.client._sync._manager import PAGE, ManagerClient
from pollard.client.types import Caller, NewToken, Token, TokenLimits
from pollard.models.v1 import token_service_pb2 as pb

SERVICE = "/pollard.models.v1.TokenService"


class TokenMethods(ManagerClient):
    """The methods about tokens."""

    def create_token(
        self,
        name: str,
        role: str,
        *,
        ttl_seconds: float | None = None,
        limits: TokenLimits | None = None,
        timeout: float | None = None,
    ) -> NewToken:
        """Make a token; its secret is in the answer and never again.

        Args:
            name: Who has it, for people.
            role: viewer, predictor, publisher, admin or server.
            ttl_seconds: How long it is valid; None for ever.
            limits: How much its holder may use.
            timeout: Deadline in seconds.

        Raises:
            ValueError: If an argument is out of its range.
            PollardError: If it fails.
        """
        request = _tokens.create_request(name, role, ttl_seconds, limits)
        answer = self._call(
            f"{SERVICE}/CreateToken", self._token_stub.CreateToken, request, timeout
        )
        return _tokens.new_token(answer)

    def tokens(self, *, show_ended: bool = False) -> list[Token]:
        """List tokens, newest first.

        Args:
            show_ended: Also those that were revoked or have expired.

        Raises:
            PollardError: If it fails.
        """
        found: list[Token] = []
        page_token = ""
        while True:
            request = pb.ListTokensRequest(
                page_size=PAGE, page_token=page_token, show_ended=show_ended
            )
            page = self._call(f"{SERVICE}/ListTokens", self._token_stub.ListTokens, request, None)
            found += [_tokens.token(item) for item in page.tokens]
            page_token = page.next_page_token
            if not page_token:
                return found

    def revoke_token(self, token_id: str, *, timeout: float | None = None) -> Token:
        """End a token for good.

        Args:
            token_id: Its id.
            timeout: Deadline in seconds.

        Raises:
            NotFound: If there is none.
            PollardError: If it fails.
        """
        request = pb.RevokeTokenRequest(name=f"tokens/{token_id}")
        answer = self._call(
            f"{SERVICE}/RevokeToken", self._token_stub.RevokeToken, request, timeout
        )
        return _tokens.token(answer.token)

    def caller(self, *, timeout: float | None = None) -> Caller:
        """Tell who this client is to the manager.

        Raises:
            Unauthenticated: If it does not know.
            PollardError: If it fails.
        """
        request = pb.GetCallerRequest()
        answer = self._call(f"{SERVICE}/GetCaller", self._token_stub.GetCaller, request, timeout)
        return _tokens.caller(answer)
