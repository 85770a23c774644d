"""What to do about an error, where that takes a look at what there is."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import grpc

from pollard.client import ModelsClient, PollardError, RequestFailed, RetryPolicy
from pollard.client.environment import CA, CERTIFICATE, KEY, TOKEN, connection

_PATIENCE_SECONDS = 3.0
_NAMED = 5


_OF_CONNECTIONS = (
    (
        "Failed to create security handshaker",
        f"A file that {CA}, {CERTIFICATE} or {KEY} names is no PEM file, or certificate and key do "
        "not belong together.",
    ),
    (
        "Hostname Verification Check failed",
        "Its certificate is for another name; --server can call it by a name that is in it.",
    ),
    (
        "certificate has expired",
        "Its certificate has ended, and has to be renewed there.",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        f"Its certificate is signed by none of the authorities in {CA}.",
    ),
    (
        "WRONG_VERSION_NUMBER",
        f"It speaks no TLS, which {CA} asks for.",
    ),
    (
        "Socket closed",
        f"It ended the connection. If it speaks TLS, name its authority in {CA}; if it asks for a "
        f"certificate, name one that it trusts in {CERTIFICATE}, and its key in {KEY}.",
    ),
)


_FLAGS = {"SIGNATURE_CHANGED": "--allow-signature-change", "MODEL_IN_USE": "--force"}
"""By reason: what goes on all the same."""


def of_connection(error: RequestFailed) -> str:
    """Return what would help where no connection was made."""
    for words, help_text in _OF_CONNECTIONS:
        if words in error.message:
            return help_text
    return "Is it running? `pollard up` starts all services; --server names another address."


def hint(error: RequestFailed) -> str:
    """Return what would help after an error, on a line of its own; empty where nothing is known.

    The manager is asked what there is; what it does not answer soon is left out.
    """
    # The inference service gives a reason, gRPC's own servers none.
    foreign = error.reason == "FEATURE_NOT_OFFERED" and error.method.startswith("/pollard.")
    if error.code is grpc.StatusCode.UNIMPLEMENTED and (foreign or not error.reason):
        return (
            f"\nThe server at {error.address} speaks another service, or an older version. "
            "`pollard up` prints which address is which; by default models is on port 8021, "
            "preprocess on 8011 and inference on 8001."
        )
    if error.reason == "TOKEN_MISSING":
        return f"\nOf commands it is taken from {TOKEN}, or from {CERTIFICATE} and {KEY}."
    if error.reason == "SIGNATURE_CHANGED" and error.method.endswith("/CreateRollout"):
        words = [error.metadata.get(key, "") for key in ("model", "alias", "revision")]
        return (
            f"\nOn the command line: pollard models alias {' '.join(words)} {_FLAGS[error.reason]}"
        )
    if error.reason in _FLAGS:
        return f"\nOn the command line: {_FLAGS[error.reason]}"
    if not error.method.startswith("/pollard.models.v1."):
        return ""
    model = error.metadata.get("model", "")
    try:
        with ModelsClient(
            error.address,
            timeout=_PATIENCE_SECONDS,
            retry=RetryPolicy.none(),
            **connection(),
        ) as client:
            return _of_what_there_is(client, error, model)
    except (PollardError, ValueError):
        return ""


def _of_what_there_is(client: ModelsClient, error: RequestFailed, model: str) -> str:
    reason = error.reason
    if reason == "MODEL_NOT_FOUND":
        names = [item.name for item in client.models()]
        if not names:
            return "\nThere are no models yet; `pollard models push DIR --model NAME` adds one."
        return f"{_nearest(model, names)}\n`pollard models list` shows them all."
    if reason in ("MODEL_DELETED", "REVISION_DELETED") and model:
        revision = error.metadata.get("revision")
        again = f"{model} --revision {revision}" if revision else model
        return f"\nOn the command line: pollard models undelete {again}"
    if reason == "REVISION_NOT_FOUND" and model:
        numbers = [str(item.revision) for item in client.revisions(model)]
        if not numbers:
            return f"\n{model} has no revisions yet; `pollard models push` adds one."
        more = f" and {len(numbers) - _NAMED} older ones" if len(numbers) > _NAMED else ""
        return f"\nIt has {', '.join(numbers[:_NAMED])}{more}: `pollard models show {model}`."
    if reason == "ALIAS_NOT_FOUND" and model:
        names = [item.name for item in client.model(model).aliases]
        if names:
            near = _nearest(error.metadata.get("alias", ""), names)
            return f"{near}\nIt has {', '.join(sorted(names)[:_NAMED])}."
    return ""


def _nearest(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"\nDid you mean {found[0]!r}?" if found else ""
