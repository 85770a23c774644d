"""Groups of methods that only callers who know a key may use.

As Triton's ``--grpc-restricted-protocol``: a call to a method of a restricted group must carry the
metadata ``triton-grpc-protocol-KEY: VALUE``, else it is UNAVAILABLE. The value is a shared secret
that travels as it is: it keeps apart those who may load models and those who may only use them, on
a network that is trusted.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pollard.services.inference.errors import ProtocolRestricted

METADATA_PREFIX = "triton-grpc-protocol-"
"""What the metadata keys of restrictions begin with."""

PROTOCOLS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "health": frozenset({"ServerLive", "ServerReady", "ModelReady"}),
        "metadata": frozenset({"ServerMetadata", "ModelMetadata"}),
        "inference": frozenset({"ModelInfer", "ModelStreamInfer"}),
        "shared-memory": frozenset(
            f"{kind}SharedMemory{verb}"
            for kind in ("System", "Cuda")
            for verb in ("Status", "Register", "Unregister")
        ),
        "model-config": frozenset({"ModelConfig"}),
        "model-repository": frozenset(
            {"RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"}
        ),
        "statistics": frozenset({"ModelStatistics"}),
        "trace": frozenset({"TraceSetting"}),
        "logging": frozenset({"LogSettings"}),
    }
)
"""Methods by group. The groups have the names that they have in Triton."""

_KEY = re.compile(r"[a-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class Restriction:
    """What a call must carry."""

    header: str
    """Metadata key, in lower case."""
    value: bytes = field(repr=False)

    def check(self, metadata: Iterable[tuple[str | bytes, str | bytes]]) -> None:
        """Check the metadata of a call.

        Raises:
            ProtocolRestricted: it has not got the key with this value.
        """
        for key, value in metadata:
            if _bytes(key) == self.header.encode() and hmac.compare_digest(
                _bytes(value), self.value
            ):
                return
        raise ProtocolRestricted(
            f"This protocol is restricted, expecting header '{self.header}'", header=self.header
        )


def parse_restrictions(texts: Iterable[str]) -> Mapping[str, Restriction]:
    """Return the restrictions by method.

    Args:
        texts: Each ``PROTOCOL[,PROTOCOL…]:KEY=VALUE``.

    Raises:
        ValueError: one is not of this form, names an unknown group, or one that another has named.
    """
    found: dict[str, Restriction] = {}
    for text in texts:
        # Never the value: it is a secret, and the message goes to a terminal or a log.
        names, colon, pair = text.partition(":")
        key, equals, value = pair.partition("=")
        if not (names and colon and key and equals and value):
            shown = f"'{names}:{key}'" if colon and equals else "a restricted protocol"
            raise ValueError(
                f"{shown} must be PROTOCOL[,PROTOCOL…]:KEY=VALUE, such as "
                "model-repository,logging:admin=SECRET"
            )
        key = key.lower()
        if not _KEY.fullmatch(key) or key.endswith("-bin"):
            raise ValueError(
                f"the key '{key}' must be letters, digits, '-', '_' and '.', and not end with -bin"
            )
        if not value.isascii() or not value.isprintable() or value != value.strip():
            raise ValueError(
                f"the value of the key '{key}' must be printable ASCII without blanks at its ends"
            )
        for name in names.split(","):
            methods = PROTOCOLS.get(name)
            if methods is None:
                raise ValueError(f"there is no protocol '{name}'; there are {', '.join(PROTOCOLS)}")
            if methods & found.keys():
                raise ValueError(f"the protocol '{name}' is restricted twice; name it once")
            restriction = Restriction(METADATA_PREFIX + key, value.encode())
            found |= dict.fromkeys(methods, restriction)
    return MappingProxyType(found)


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text
