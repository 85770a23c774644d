"""Who calls, what they may do, and how much: see `docs/security.md`.

For servicers: `current_caller()` says who makes the call that is being answered. For HTTP handlers:
`Gate.caller_of_headers(headers)`, or `Gate.caller_of_token(token)` where it comes from a form, and
`Caller.may(Role.PUBLISHER)`.
"""

from __future__ import annotations

from pollard.services.common.auth.callers import (
    OPEN,
    Caller,
    Limits,
    Role,
    calling,
    current_caller,
)
from pollard.services.common.auth.gate import Gate, GateRules
from pollard.services.common.auth.roles import ACCESS, Access

__all__ = [
    "ACCESS",
    "OPEN",
    "Access",
    "Caller",
    "Gate",
    "GateRules",
    "Limits",
    "Role",
    "calling",
    "current_caller",
]
