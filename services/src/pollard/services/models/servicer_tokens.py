"""TokenService over gRPC: decode, call the domain, encode."""

from __future__ import annotations

from pollard.models.v1 import token_service_pb2 as pb
from pollard.models.v1 import token_service_pb2_grpc as pb_grpc
from pollard.services.common.auth import current_caller
from pollard.services.common.auth.wire import limits_of, role_of, role_to_proto
from pollard.services.common.errors import InvalidRequest
from pollard.services.models import tokens
from pollard.services.models.access import AccessKeeper
from pollard.services.models.servicer_rollouts import Context, actor
from pollard.services.models.store import Store, now_us


class TokenServicer(pb_grpc.TokenServiceServicer):
    """Makes, lists and ends tokens."""

    def __init__(self, store: Store, keeper: AccessKeeper) -> None:
        self._store, self._keeper = store, keeper

    async def CreateToken(
        self, request: pb.CreateTokenRequest, context: Context
    ) -> pb.CreateTokenResponse:
        """Make a token; its secret is in this answer only."""
        role = role_of(request.token.role)
        if role is None:
            raise InvalidRequest(
                "token.role is missing; choose viewer, predictor, publisher, admin or server",
                reason="TOKEN_ROLE_MISSING",
                field="token.role",
            )
        expire_us = None
        if request.HasField("ttl"):
            expire_us = now_us() + request.ttl.ToMicroseconds()
        elif request.token.HasField("expire_time"):
            expire_us = request.token.expire_time.ToMicroseconds()
        who = actor(context)
        row, secret = await self._store.write(
            lambda session: tokens.create_token(
                session,
                name=request.token.display_name,
                role=role,
                actor=who,
                expire_us=expire_us,
                limits=limits_of(request.token.limits),
            )
        )
        await self._keeper.refresh()
        return pb.CreateTokenResponse(token=tokens.to_proto(row), secret=secret)

    async def ListTokens(
        self, request: pb.ListTokensRequest, context: Context
    ) -> pb.ListTokensResponse:
        """List tokens, newest first."""
        found, more = await self._store.read(
            lambda session: tokens.list_tokens(
                session,
                page_size=request.page_size,
                page_token=request.page_token,
                show_ended=request.show_ended,
            )
        )
        return pb.ListTokensResponse(
            tokens=[tokens.to_proto(row) for row in found], next_page_token=more
        )

    async def RevokeToken(
        self, request: pb.RevokeTokenRequest, context: Context
    ) -> pb.RevokeTokenResponse:
        """End a token."""
        kind, _, token_id = request.name.partition("/")
        if kind != "tokens" or not token_id:
            raise InvalidRequest(
                "name is not of the form tokens/{token}", reason="NAME_INVALID", field="name"
            )
        who = actor(context)
        row = await self._store.write(
            lambda session: tokens.revoke_token(session, token_id, actor=who)
        )
        await self._keeper.refresh()
        return pb.RevokeTokenResponse(token=tokens.to_proto(row))

    async def GetCaller(
        self, request: pb.GetCallerRequest, context: Context
    ) -> pb.GetCallerResponse:
        """Tell who the caller is."""
        caller = current_caller()
        answer = pb.GetCallerResponse(
            display_name=caller.name, role=role_to_proto(caller.role), kind=caller.kind
        )
        if caller.expires is not None:
            answer.expire_time.FromNanoseconds(int(caller.expires * 1e9))
        return answer
