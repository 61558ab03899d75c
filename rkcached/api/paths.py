"""The paths by which clients of other servers call an endpoint.

A client is told a base URL, and some have it with `/v1`, some without, some with a slash at its
end.
"""

from __future__ import annotations

import re
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

_V1: Final = "/v1"

# The first steps of the paths below /v1.
_BELOW_V1: Final = frozenset(
    {
        "cache",
        "chat",
        "completions",
        "embeddings",
        "events",
        "gc",
        "import",
        "messages",
        "models",
        "reload",
        "rerank",
        "responses",
        "status",
        "suggestions",
    }
)

_OTHER_NAMES: Final = {
    "/health": "/healthz",
    "/v1/health": "/healthz",
    "/reranking": "/v1/rerank",
    "/v1/reranking": "/v1/rerank",
    "/v2/rerank": "/v1/rerank",
}
"""By llama.cpp's server, and by Cohere's clients."""

# A client that takes us for its proxy names the host in the target, too.
_ABSOLUTE: Final = re.compile(r"https?://([^/?#]+)(/.*)?", re.IGNORECASE | re.DOTALL)

_SLASHES: Final = re.compile("/{2,}")

RIGHT_ONES: Final = {
    "/completion": "/v1/completions",
    "/embedding": "/v1/embeddings",
}
"""Endpoints of llama.cpp that take other bodies, and ours for them.
"""


def usual_path(path: str) -> str:
    """The path of the endpoint that is meant."""
    if "//" in path:
        path = _SLASHES.sub("/", path)
    if len(path) > 1 and path.endswith("/"):
        path = path[:-1]
    path = _OTHER_NAMES.get(path, path)
    if path.startswith("/v1/"):
        return path
    return _V1 + path if path[1:].partition("/")[0] in _BELOW_V1 else path


class UsualPaths:
    """ASGI: lets every request have the usual path, and the host of its target, if that has one.

    That host counts instead of the header's (RFC 9112, 3.2.2).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            absolute = _ABSOLUTE.fullmatch(scope["path"])
            if absolute is not None:
                host, path = absolute.groups()
                MutableHeaders(scope=scope)["host"] = host
                scope["path"] = path or "/"
            scope["path"] = usual_path(scope["path"])
        await self._app(scope, receive, send)
