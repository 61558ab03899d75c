"""Refuses what a browser sends for the page of another site.

The sockets are no ports, but a port may lead to them (docs/page.md), and then any page that is open
in the user's browser can send requests there. A browser says for which page it asks: in `Origin`
(RFC 6454) and `Sec-Fetch-Site` (W3C, Fetch Metadata). A page whose name was made to lead to the
port, by DNS rebinding, counts as the same site, but names itself in `Host`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from rkcached.api.exchange import error_response
from rkcached.errors import RequestError

_OWN_SITES = frozenset({"", "same-origin", "none"})


class OwnSite:
    """ASGI: lets only requests for our own site through."""

    def __init__(self, app: ASGIApp, hosts: Callable[[], Collection[str]]) -> None:
        """`hosts`: the names, besides those that are always good, by which we may be called."""
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            error = _refusal(scope["method"], Headers(scope=scope), self._hosts())
            if error is not None:
                app = error_response(error)
        await app(scope, receive, send)


def _refusal(method: str, headers: Headers, hosts: Collection[str]) -> RequestError | None:
    host = headers.get("host", "").lower()
    if not _is_ours(_name(host), hosts):
        return RequestError(
            403,
            f"the request is for the host {_name(host)[:100]!r}, which is none of ours",
            code="foreign_host",
            hint="use the name localhost, or add yours to serving.hosts in the manifest",
        )

    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
        return _foreign(f"a page of the origin {origin[:100]!r}")

    # A link on another site may lead to our page.
    follows_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
    if headers.get("sec-fetch-site", "") not in _OWN_SITES and not follows_link:
        return _foreign("a page of another site")
    return None


def _foreign(page: str) -> RequestError:
    return RequestError(
        403,
        f"{page} sent this request",
        code="foreign_origin",
        hint="only rkcached's own page may send requests from a browser; a proxy must pass the "
        "Host header on as it is, with its port",
    )


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_ours(name: str, hosts: Collection[str]) -> bool:
    """Nobody else can make a name without a dot, an address or a name of ours lead to us."""
    name = name.removesuffix(".")
    if "." not in name and ":" not in name:
        return True
    if name.endswith(".localhost") or name in hosts:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
