"""Images by their address, for servers that were told to fetch them.

Whoever may name an address can make this server talk to it. So nothing is fetched unless a setting
names the hosts; names are resolved here, and nothing is connected to but public addresses, also
after a redirection: the address that was checked is the one that is used. Addresses, which may hold
secrets, are neither logged nor repeated.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from pollard.runtime.errors import ImageTooLarge
from pollard.services.common.errors import StartupError
from pollard.services.preprocess.errors import UriRefused, UriUnreachable

_MAX_REDIRECTS = 3
_MAX_URI_LENGTH = 4096
_PORTS = {"https": 443, "http": 80}
_REDIRECTIONS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 256 * 1024

ANY_HOST = "*"

_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that a gateway makes IPv4 ones of (RFC 6052)."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class FetchRules:
    """What may be fetched."""

    hosts: tuple[str, ...] = ()
    """Names, on the usual ports; "host:port" for another one; "*.example.org" for all names below
    one; "*" for any. None means no fetching."""
    allow_http: bool = False
    """Whether an unencrypted connection will do."""
    timeout_seconds: float = 10.0
    """For one image, redirections included."""
    max_bytes: int = 32 * 1024**2
    """Largest image file, in bytes."""
    at_once: int = 16
    """Images that are fetched at the same time."""


def is_public(address: Address) -> bool:
    """Tell whether an address belongs to the public network."""
    mapped = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if mapped is not None:
        return is_public(mapped)
    if address in _TRANSLATED:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address.is_global and not address.is_multicast


class Fetcher:
    """Fetches images. Belongs to the event loop's thread.

    Raises:
        StartupError: fetching is allowed, but aiohttp is not installed.
    """

    def __init__(self, rules: FetchRules, allows: Callable[[Address], bool] = is_public) -> None:
        """Take the rules; no connection is made.

        Args:
            rules: What may be fetched.
            allows: Whether an address may be connected to.
        """
        self.rules = rules
        self._allows = allows
        self._session: Any = None
        self._turns = asyncio.Semaphore(rules.at_once)
        if rules.hosts:
            try:
                import aiohttp  # noqa: F401 - only whether it is there
            except ImportError:
                raise StartupError(
                    "uri_hosts allows images to be fetched, which needs aiohttp; "
                    "pip install 'pollard-services[uris]'"
                ) from None

    async def fetch(self, uri: str) -> bytes:
        """Return the bytes of one image.

        Raises:
            UriRefused: the rules do not allow the address, or the server there does not give it.
            UriUnreachable: nothing could be had within the time; trying again may help.
            ImageTooLarge: it has more bytes than an image may have.
        """
        if not self.rules.hosts:
            raise UriRefused("this server fetches no URIs; send the image's bytes as content")
        async with self._turns:
            try:
                async with asyncio.timeout(self.rules.timeout_seconds):
                    return await self._follow(uri)
            except TimeoutError:
                raise UriUnreachable(
                    f"the image could not be fetched within {self.rules.timeout_seconds:g} s; "
                    "send its bytes as content",
                    timeout_seconds=self.rules.timeout_seconds,
                ) from None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _follow(self, uri: str) -> bytes:
        for _ in range(_MAX_REDIRECTS + 1):
            self._check(uri)
            outcome = await self._get(uri)
            if isinstance(outcome, bytes):
                return outcome
            uri = urljoin(uri, outcome)
        raise UriRefused(f"the URI leads to more than {_MAX_REDIRECTS} others")

    def _check(self, uri: str) -> None:
        """Check everything but the address that the name stands for."""
        if len(uri) > _MAX_URI_LENGTH:
            raise UriRefused(f"the URI is longer than {_MAX_URI_LENGTH} characters")
        try:
            parts = urlsplit(uri)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise UriRefused("the URI cannot be read; give one such as https://host/path") from None
        schemes = ("https", "http") if self.rules.allow_http else ("https",)
        if parts.scheme not in schemes or not host:
            raise UriRefused(f"this server fetches {' and '.join(schemes)} URIs only")
        if parts.username is not None or parts.password is not None:
            raise UriRefused("the URI holds a user name or password; send the image's bytes")
        usual = _PORTS[parts.scheme]
        if not any(_matches(rule, host, port or usual, usual) for rule in self.rules.hosts):
            raise UriRefused(
                "this server does not fetch from that host; send the image's bytes as content, or "
                "have the operator add it to uri_hosts"
            )
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return  # A name: judged when it is resolved.
        if not self._allows(address):
            raise UriRefused("the URI's address is not a public one")

    async def _get(self, uri: str) -> bytes | str:
        """Return the content, or where else it is."""
        import aiohttp

        if self._session is None:
            self._session = _session(self._allows)
        try:
            async with self._session.get(uri, allow_redirects=False) as response:
                if response.status in _REDIRECTIONS and response.headers.get("Location"):
                    return str(response.headers["Location"])
                if response.status >= 500 or response.status == 429:
                    raise UriUnreachable(
                        f"the server of the URI answered {response.status}; try again later"
                    )
                if response.status != 200:
                    raise UriRefused(f"the server of the URI answered {response.status}, not 200")
                return await self._read(response)
        except _AddressRefused:
            raise UriRefused("the URI's address is not a public one") from None
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.__cause__, _AddressRefused):
                raise UriRefused("the URI's address is not a public one") from None
            raise UriUnreachable("the server of the URI cannot be reached") from None
        except (aiohttp.InvalidURL, ValueError):
            raise UriRefused("the URI cannot be read") from None
        except (aiohttp.ClientError, OSError):
            raise UriUnreachable("the server of the URI broke off") from None

    async def _read(self, response: Any) -> bytes:
        limit = self.rules.max_bytes
        content = bytearray()
        if (response.content_length or 0) > limit:
            raise _too_large(limit)
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            content += chunk
            if len(content) > limit:
                raise _too_large(limit)
        return bytes(content)


class _AddressRefused(OSError):
    """A name stands for addresses that may not be connected to."""


def _session(allows: Callable[[Address], bool]) -> Any:
    import aiohttp
    from aiohttp.abc import AbstractResolver, ResolveResult

    class Resolver(AbstractResolver):
        """Gives allowed addresses only; what it gives is what is connected to."""

        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[ResolveResult]:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, family=family, type=socket.SOCK_STREAM
            )
            allowed = [
                ResolveResult(
                    hostname=host,
                    host=str(place[0]),
                    port=port,
                    family=kind,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST,
                )
                for kind, _, protocol, _, place in found
                if allows(ipaddress.ip_address(str(place[0]).partition("%")[0]))
            ]
            if not allowed:
                raise _AddressRefused(f"no address of {host} may be connected to")
            return allowed

        async def close(self) -> None:
            """Nothing is kept."""

    return aiohttp.ClientSession(
        # Nothing is cached: a name that changes its mind is judged again.
        connector=aiohttp.TCPConnector(resolver=Resolver(), use_dns_cache=False, limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        # The size limit is on what comes over the wire; a bomb is not unpacked.
        auto_decompress=False,
        headers={"User-Agent": "pollard", "Accept": "image/*", "Accept-Encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=None),
        trust_env=False,
    )


def _matches(rule: str, host: str, port: int, usual_port: int) -> bool:
    rule, host = rule.lower(), host.lower()
    if rule.count(":") == 1:
        return rule == f"{host}:{port}"
    if port != usual_port:
        return False
    if rule == ANY_HOST:
        return True
    return host.endswith(rule[1:]) if rule.startswith("*.") else host == rule


def _too_large(limit: int) -> ImageTooLarge:
    return ImageTooLarge(
        f"the image has more than {limit} bytes, which is the limit", limit_bytes=limit
    )
