"""Lets in over TCP who brings a key.

A Unix socket has an owner and a group, and the kernel tells who opened a connection to it; a port
has neither. So each request over TCP brings a key, as `Authorization: Bearer` or `x-api-key`. On a
Unix socket none is needed, and one that is sent is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from rkcached.api.callers import ACCESS_KEY, PEER, TCP
from rkcached.api.exchange import error_response
from rkcached.errors import RequestError
from rkcached.sources.access_keys import AccessKeys

_HINT = "create one with `sudo rkcached key add NAME`, and send it as the API key"


class KeyCheck:
    """ASGI: refuses a request over TCP that has no valid key."""

    def __init__(
        self, app: ASGIApp, keys: AccessKeys, *, open_loopback: bool, for_admins: bool
    ) -> None:
        """`open_loopback`: connections to a loopback address need no key.

        `for_admins`: everything behind is for admin keys; then no port is open.
        """
        self._app = app
        self._keys = keys
        self._open_loopback = open_loopback and not for_admins
        self._for_admins = for_admins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.get("state", {})
        error = None
        if TCP in state:
            error = self._refusal(scope)
        if error is None:
            await self._app(scope, receive, send)
            return

        response = error_response(error)
        if error.code == "too_many_connections":
            response.headers["Connection"] = "close"
        if error.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        """Note whose the request is, or return why it is refused."""
        state = scope["state"]
        presented = list(_presented(Headers(scope=scope)))
        key = self._keys.find(presented) if presented else None
        if key is not None:
            state[ACCESS_KEY] = key
            state[PEER] = {**state[PEER], "key": key.name}
            if self._for_admins and not key.admin:
                return RequestError(
                    403,
                    "this port is for admin keys only",
                    code="admin_only",
                    hint="create one with `sudo rkcached key add NAME --admin`",
                )
            if not state[TCP].take_place(key.owner):
                return RequestError(
                    503,
                    "too many connections with this key",
                    code="too_many_connections",
                    hint="close some of them",
                    retry_after_s=1,
                )
            return None

        if self._open_loopback and state[TCP].is_loopback:
            return None

        why = "a request over TCP needs a key"
        if presented:
            why = "the key is not valid; it may have been revoked"
        return RequestError(401, why, code="invalid_api_key", hint=_HINT)


def _presented(headers: Headers) -> Iterator[str]:
    """The texts that may be keys. A client may send both headers."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        yield credentials.strip()
    if key := headers.get("x-api-key", "").strip():
        yield key
