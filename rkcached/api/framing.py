"""Refuses requests that say twice where they end (RFC 9112, 6.3), which h11 lets through.

A proxy before us may have gone by the other one, and would take the rest for the next request.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from rkcached.api.exchange import error_response
from rkcached.errors import RequestError

_LENGTHS = frozenset({b"content-length", b"transfer-encoding"})


class Framing:
    """ASGI: lets only requests through that have one length; the connection of others is closed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and _LENGTHS.issubset(name for name, _ in scope["headers"]):
            refusal = error_response(
                RequestError(
                    400,
                    "the request has both Content-Length and Transfer-Encoding, so its end is "
                    "ambiguous",
                    code="ambiguous_length",
                    hint="send one of them",
                )
            )
            refusal.headers["Connection"] = "close"
            app = refusal
        await app(scope, receive, send)
