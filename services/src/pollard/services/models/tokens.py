"""Tokens in the registry: made, listed, ended, and told to the servers.

Only their SHA-256 is kept. Every function works in the caller's transaction.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import token_service_pb2 as pb
from pollard.services.common.auth.callers import Limits, Role
from pollard.services.common.auth.tokens import digest_of, id_of, make_token
from pollard.services.common.auth.wire import limits_to_proto, role_to_proto
from pollard.services.common.errors import InvalidRequest, NotFound, ResourceExhausted, StartupError
from pollard.services.models import names
from pollard.services.models.events import MANAGER, record
from pollard.services.models.schema import Meta, Token
from pollard.services.models.store import now_us

MOST_TOKENS = 10_000
"""Tokens that have not ended: every server is told of all of them."""

INITIAL_ROLES = (Role.ADMIN, Role.SERVER)
"""Roles of the tokens with which an installation begins."""

_VERSION = "access"
_MOST_SECONDS = 100 * 365 * 86400


def create_token(
    session: Session,
    *,
    name: str,
    role: Role,
    actor: str,
    expire_us: int | None = None,
    limits: Limits | None = None,
) -> tuple[Token, str]:
    """Make a token; return what is kept of it, and the token.

    Raises:
        InvalidRequest: name, time or limits make no sense.
        ResourceExhausted: there are too many.
    """
    names.check_model_id(name, "token.display_name")
    if expire_us is not None and not now_us() < expire_us < now_us() + _MOST_SECONDS * 1_000_000:
        raise InvalidRequest(
            "the token would end in the past, or more than a hundred years from now; give another "
            "time, or none",
            reason="TOKEN_TIME_INVALID",
            field="token.expire_time",
        )
    given = {key: value for key, value in asdict(limits or Limits()).items() if value}
    for key, value in given.items():
        if not (value == -1 or 0 < value <= 2**53):
            raise InvalidRequest(
                f"limits.{key} must be above 0, or -1 for none, not {value}",
                reason="TOKEN_LIMIT_INVALID",
                field=f"token.limits.{key}",
                value=value,
            )
    alive = session.scalar(select(func.count()).select_from(Token).where(_alive())) or 0
    if alive >= MOST_TOKENS:
        raise ResourceExhausted(
            f"there are {alive} tokens that have not ended, as many as there may be; revoke some",
            reason="TOO_MANY_TOKENS",
            tokens=alive,
        )
    secret = make_token()
    row = Token(
        token_id=id_of(secret),
        sha256=digest_of(secret).hex(),
        name=name,
        role=role.value,
        limits=given,
        creator=actor,
        create_time=now_us(),
        expire_time=expire_us,
        revoke_time=None,
    )
    session.add(row)
    _changed(session)
    record(session, actor, "token.create", f"tokens/{row.token_id}", f"{name}, {role.value}")
    return row, secret


def revoke_token(session: Session, token_id: str, *, actor: str) -> Token:
    """End a token for good; nothing happens to one that has ended so already.

    Raises:
        NotFound: there is none of this id.
    """
    row = session.get(Token, token_id)
    if row is None:
        raise NotFound(
            f"there is no token {token_id!r}", reason="TOKEN_NOT_FOUND", token=token_id[:64]
        )
    if row.revoke_time is None:
        row.revoke_time = now_us()
        _changed(session)
        record(session, actor, "token.revoke", f"tokens/{token_id}", row.name)
    return row


def list_tokens(
    session: Session, *, page_size: int, page_token: str, show_ended: bool
) -> tuple[list[Token], str]:
    """Return a page of tokens, newest first, and the token of the next page.

    Raises:
        InvalidRequest: page size or page token is not valid.
    """
    limit = names.page_limit(page_size, default=100)
    query = {"list": "tokens", "ended": show_ended}
    last = names.read_page_token(query, page_token, int, str)
    statement = select(Token).order_by(Token.create_time.desc(), Token.token_id).limit(limit + 1)
    if not show_ended:
        statement = statement.where(_alive())
    if last is not None:
        statement = statement.where(
            or_(
                Token.create_time < last[0],
                (Token.create_time == last[0]) & (Token.token_id > last[1]),
            )
        )
    found = list(session.scalars(statement))
    more = ""
    if len(found) > limit:
        end = found[limit - 1]
        more = names.make_page_token(query, [end.create_time, end.token_id])
    return found[:limit], more


def access_version(session: Session) -> int:
    """Return a number that grows with every change of the tokens."""
    meta = session.get(Meta, _VERSION)
    return meta.number if meta is not None else 0


def access_list(session: Session) -> fleet_pb.AccessList:
    """Return what servers must know: also of revoked tokens, so that they can say so."""
    rows = session.scalars(
        select(Token).where(or_(Token.expire_time.is_(None), Token.expire_time > now_us()))
    )
    access = fleet_pb.AccessList(version=access_version(session))
    for row in rows:
        access.tokens.append(_to_access(row))
    return access


def to_proto(row: Token) -> pb.Token:
    """Return a token as the contract shows it."""
    message = pb.Token(
        name=f"tokens/{row.token_id}",
        display_name=row.name,
        role=role_to_proto(Role(row.role)),
        limits=limits_to_proto(_limits(row)),
        creator=row.creator,
    )
    message.create_time.FromMicroseconds(row.create_time)
    if row.expire_time is not None:
        message.expire_time.FromMicroseconds(row.expire_time)
    if row.revoke_time is not None:
        message.revoke_time.FromMicroseconds(row.revoke_time)
    return message


def initial_files(folder: Path) -> dict[Role, Path]:
    """Return where the tokens lie with which an installation begins."""
    return {role: folder / f"{role.value}.token" for role in INITIAL_ROLES}


def take_initial(session: Session, folder: Path) -> list[Path]:
    """Let the tokens of a folder in; if there never was any token, make those first.

    A file `admin.token` or `server.token` holds one of that role. It counts until it is revoked;
    the file may be removed.

    Returns:
        The files that were made.

    Raises:
        StartupError: a file holds no token, or cannot be written or read.
    """
    files = initial_files(folder)
    made: list[Path] = []
    try:
        if not session.scalar(select(func.count()).select_from(Token)):
            made = _make_files(path for path in files.values() if not path.exists())
        for role, path in files.items():
            if path.exists():
                _take(session, role, path)
    except OSError as error:
        raise StartupError(f"the first tokens in {folder} cannot be used: {error}") from error
    return made


def _make_files(paths: Iterable[Path]) -> list[Path]:
    made = []
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Nobody else may read it, not even for a moment.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(make_token() + "\n")
            file.flush()
            os.fsync(file.fileno())
        made.append(path)
    return made


def _take(session: Session, role: Role, path: Path) -> None:
    secret = path.read_text().strip()
    token_id = id_of(secret)
    if not token_id:
        raise StartupError(f"{path} holds no token; `pollard tokens generate` makes one")
    if session.get(Token, token_id) is not None:
        return
    session.add(
        Token(
            token_id=token_id,
            sha256=digest_of(secret).hex(),
            name=f"first-{role.value}",
            role=role.value,
            limits={},
            creator=MANAGER,
            create_time=now_us(),
            expire_time=None,
            revoke_time=None,
        )
    )
    _changed(session)
    record(session, MANAGER, "token.create", f"tokens/{token_id}", f"first-{role.value}")


def _alive() -> ColumnElement[bool]:
    now = now_us()
    return Token.revoke_time.is_(None) & or_(Token.expire_time.is_(None), Token.expire_time > now)


def _changed(session: Session) -> None:
    meta = session.get(Meta, _VERSION)
    if meta is None:
        session.add(Meta(key=_VERSION, number=1, content=b""))
    else:
        meta.number += 1
    session.flush()


def _limits(row: Token) -> Limits:
    return Limits(**row.limits)  # type: ignore[arg-type]  # JSON keeps whole numbers whole


def _to_access(row: Token) -> fleet_pb.AccessToken:
    token = fleet_pb.AccessToken(
        token_id=row.token_id,
        display_name=row.name,
        sha256=bytes.fromhex(row.sha256),
        role=role_to_proto(Role(row.role)),
        revoked=row.revoke_time is not None,
    )
    if row.expire_time is not None:
        token.expire_time.FromMicroseconds(row.expire_time)
    if row.limits:
        token.limits.CopyFrom(limits_to_proto(_limits(row)))
    return token
