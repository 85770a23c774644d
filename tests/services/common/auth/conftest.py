"""Tokens that a gate knows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pollard.services.common.auth.callers import Role
from pollard.services.common.auth.tokens import KnownToken, TokenTable, digest_of, id_of, make_token


class Tokens:
    """Tokens, and the table of them."""

    def __init__(self) -> None:
        self.known: dict[str, KnownToken] = {}

    def make(self, role: Role, name: str = "somebody", **more: Any) -> str:
        token = make_token()
        self.known[token] = KnownToken(id_of(token), name, digest_of(token), role, **more)
        return token

    def change(self, token: str, **more: Any) -> None:
        self.known[token] = replace(self.known[token], **more)

    @property
    def table(self) -> TokenTable:
        return TokenTable.of(self.known.values())


@pytest.fixture
def tokens() -> Tokens:
    return Tokens()
