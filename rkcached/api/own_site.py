"""Refuses what a browser sends for the page of another site.

A port (docs/port.md) can be reached by any page that is open in the user's browser, and a port may
lead to a socket, too (docs/page.md). A browser says for which page it asks: in `Origin`
(RFC 6454) and `Sec-Fetch-Site` (W3C, Fetch Metadata). A page whose name was made to lead to the
port, by DNS rebinding, counts as the same site, but names itself in `Host`.

Pages of the origins that `serving.cors` names may ask: CORS (Fetch standard). A browser first asks
for leave, by a preflight request, which carries no key.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from rkcached.api.exchange import error_response
from rkcached.errors import RequestError

_OWN_SITES = frozenset({"", "same-origin", "none"})


class OwnSite:
    """ASGI: lets only requests for our own site through."""

    def __init__(
        self,
        app: ASGIApp,
        hosts: Callable[[], Collection[str]],
        origins: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """`hosts`: the names, besides those that are always good, by which we may be called.

        `origins`: those of other sites whose pages may ask.
        """
        self._app = app
        self._hosts = hosts
        self._origins = origins
        self._shared = _Shared(app, ())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origins = self._origins()
            error = _refusal(scope["method"], headers, self._hosts(), origins)
            if error is not None:
                app = error_response(error)
            elif headers.get("origin") in origins:
                app = self._for_origins(origins)
        await app(scope, receive, send)

    def _for_origins(self, origins: tuple[str, ...]) -> ASGIApp:
        """The app with CORS headers; it is made again when the manifest has other origins."""
        if origins != self._shared.allow_origins:
            self._shared = _Shared(self._app, origins)
        return self._shared


class _Shared(CORSMiddleware):
    """ASGI: CORS for pages of these origins."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=("X-Request-Id", "Retry-After"),
        )


def _refusal(
    method: str, headers: Headers, hosts: Collection[str], origins: Collection[str] = ()
) -> RequestError | None:
    host = headers.get("host", "").lower()
    if not _is_ours(_name(host), hosts):
        return RequestError(
            403,
            f"the Host header has the name {_name(host)[:100]!r}, which this daemon does not "
            "accept",
            code="foreign_host",
            hint="use the name localhost, or add yours to serving.hosts in the manifest",
        )

    origin = headers.get("origin")
    if origin in origins:
        return None
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
        hint="only rkcached's own page and those of serving.cors may send requests from a browser; "
        "a proxy must pass the Host header on as it is, with its port",
    )


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_ours(name: str, hosts: Collection[str]) -> bool:
    """Nobody else can make a name without a dot, an address or a name of ours lead to us.

    Nor one in .internal, which is reserved for private use, so no stranger can have one in the
    DNS: containers call their host so (host.docker.internal, host.containers.internal).
    """
    name = name.removesuffix(".")
    if "." not in name and ":" not in name:
        return True
    if name.endswith((".localhost", ".internal")) or name in hosts:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
