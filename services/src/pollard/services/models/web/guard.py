"""What every request has to satisfy, and what every answer tells the browser.

A page of another site cannot use this one in a visitor's name: cookies are sent to this site's own
requests only (SameSite), a form must bring what only a page of ours could know, and what the
browser says of where the request comes from must agree. Nor can it pretend to be this one by a name
that suddenly resolves to this machine (DNS rebinding): where nobody has to sign in, only names that
are known to be ours are answered.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import socket
from collections.abc import Collection

from aiohttp import web

COOKIE = "pollard-visit"
THEME_COOKIE = "pollard-theme"
CSRF_FIELD = "csrf"
CSRF_HEADER = "X-Pollard-Csrf"

_VISIT = re.compile(r"[A-Za-z0-9_-]{43}")

_COMMON = {
    # Otherwise aiohttp tells its version and Python's.
    "Server": "Pollard",
    "X-Content-Type-Options": "nosniff",
    # Not "no-referrer": with it browsers send "null" as the origin of our own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}

PAGE_HEADERS = {
    **_COMMON,
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; form-action 'self'; frame-src 'self'; frame-ancestors 'none'; "
        "base-uri 'none'; require-trusted-types-for 'script'; trusted-types pollard"
    ),
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
    "Vary": "Accept, Cookie",
}

REPORT_HEADERS = {
    **_COMMON,
    # A report is whatever the bundle's author wrote. Its scripts run, in an origin of their own:
    # they see no cookie and no page of ours, load nothing and send nothing.
    "Content-Security-Policy": (
        "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; "
        "style-src 'unsafe-inline'; img-src data:; font-src data:; frame-ancestors 'self'; "
        "form-action 'none'; base-uri 'none'"
    ),
    "X-Frame-Options": "SAMEORIGIN",
    "Cache-Control": "private, max-age=3600",
}

ASSET_HEADERS = {
    **_COMMON,
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "public, max-age=31536000, immutable",
}


def new_visit() -> str:
    """Return the value of a cookie for a new visitor."""
    return secrets.token_urlsafe(32)


def is_visit(value: str) -> bool:
    """Tell whether a cookie has the form of one that was given out here."""
    return _VISIT.fullmatch(value) is not None


def cookie_name(request: web.Request) -> str:
    """Return the name of the cookie: under TLS, one that no other host can set."""
    return f"__Host-{COOKIE}" if request.secure else COOKIE


def csrf_of(visit: str) -> str:
    """Return what the forms of a visitor carry: who does not know the cookie cannot know it."""
    return hashlib.sha256(b"pollard form\0" + visit.encode()).hexdigest()


def check_csrf(given: str, visit: str) -> None:
    """Compare what a form brought with the visitor's cookie.

    Raises:
        web.HTTPForbidden: it does not belong to it.
    """
    if not hmac.compare_digest(given.encode(), csrf_of(visit).encode()):
        raise web.HTTPForbidden(
            text="This form was made for another visit. Load the page again and repeat what you "
            "wanted to do; nothing was changed."
        )


def check_origin(request: web.Request) -> None:
    """Refuse a change that a page of another site asks for.

    Raises:
        web.HTTPForbidden: it is.
    """
    site = request.headers.get("Sec-Fetch-Site")
    origin = request.headers.get("Origin")
    ours = f"{request.scheme}://{request.host}"
    if (site is not None and site != "same-origin") or (origin is not None and origin != ours):
        raise web.HTTPForbidden(
            text="This request was made by a page of another site, so nothing was changed."
        )


def comes_from_elsewhere(request: web.Request) -> bool:
    """Tell whether a link on another site was followed to here."""
    return (
        request.method == "GET"
        and request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
        and request.headers.get("Sec-Fetch-Mode") == "navigate"
        and request.headers.get("Sec-Fetch-Dest") == "document"
    )


class Hosts:
    """The names under which this server may be asked where nobody has to sign in.

    Args:
        more: Names beside those of this machine.
    """

    def __init__(self, more: Collection[str] = ()) -> None:
        own = {"localhost", socket.gethostname().lower()}
        self._known = own | {name.strip().lower() for name in more if name.strip()}

    def check(self, request: web.Request) -> None:
        """Refuse a name that is not known.

        Raises:
            web.HTTPMisdirectedRequest: it is not.
        """
        host = _name_of(request.host)
        try:
            # A browser that was given an address asks that address, whatever names say.
            ipaddress.ip_address(host)
        except ValueError:
            if host not in self._known:
                raise web.HTTPMisdirectedRequest(
                    text=f"{host[:80]!r} is not known to be this machine. Ask by its address, or "
                    "start the models service with --page-hosts to allow the name."
                ) from None


def _name_of(host: str) -> str:
    """Return a Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()
