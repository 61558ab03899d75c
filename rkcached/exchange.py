"""HTTP bodies in, errors out, and the identity of each exchange. What every route shares."""

from __future__ import annotations

import contextlib
import re
import uuid

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rkcached.errors import RequestError
from rkcached.openai import error_body

log = structlog.get_logger()

MAX_BODY_BYTES = 8 << 20

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What a client may name its request; anything else gets a name from us."""


async def read_body(request: Request) -> bytes:
    """The body, of at most MAX_BODY_BYTES. Errors: RequestError 413."""
    too_large = RequestError(
        413, f"the body is larger than {MAX_BODY_BYTES:,} bytes", code="body_too_large", hint="send less text"
    )
    with contextlib.suppress(ValueError):
        if int(request.headers.get("content-length", "0")) > MAX_BODY_BYTES:
            raise too_large
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise too_large
    return bytes(data)


def error_response(error: RequestError) -> Response:
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else None
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


def no_route(request: Request, status_code: int) -> RequestError:
    what = "does not exist" if status_code == 404 else f"does not take {request.method}"
    return RequestError(status_code, f"{request.url.path} {what}", code="unknown_url", hint="see GET /v1/status")


def defect(request: Request, error: Exception) -> Response:
    log.error("request crashed", path=request.url.path, error=repr(error))
    return error_response(RequestError(500, "internal error; the daemon's log says more", code="internal_error"))


class RequestIds:
    """ASGI: every answer carries X-Request-Id, the client's own where it sent a usable one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)
