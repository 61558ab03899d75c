"""Shared by all handlers: bodies, answers and errors; the id and log line of an exchange."""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pydantic_core
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rkcached.api.bodies import ERROR_BODY, Body, error_body, parse_body
from rkcached.api.callers import PEER, TCP, caller_in, models_of
from rkcached.api.paths import RIGHT_ONES
from rkcached.api.rendering import LARGE_BYTES
from rkcached.api.request_id import usable_id
from rkcached.api.responses import Answer
from rkcached.api.shares import Share
from rkcached.errors import RequestError
from rkcached.host.logs import log
from rkcached.messages.bounds import ValueCounter
from rkcached.sources.names import meant
from rkcached.worker.held import NOBODY

Result = TypeVar("Result")

MAX_BODY_BYTES = 8 << 20

MAX_SHOWN_LETTERS = 200
"""Of a path, in a log line."""

# Bytes of a body between two turns of the event loop; counting their values takes a millisecond at
# the most.
_COUNTED_AT_ONCE = 32 << 10

# Parses large bodies. One thread: more would only take turns at Python's lock.
_PARSING = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parse")

BODIES_BYTES = 32 << 20
"""Bodies of one user's requests, until they are answered; of all users together twice as much."""

_HOLDING = "rkcached.holding"  # key of the request's scope for the memory of its body
_CAUSE = "rkcached.cause"  # key of the request's scope for the error that it ended with

# Asked so often that only a debug log shows them.
_PROBES = frozenset({"/", "/healthz", "/readyz", "/metrics", "/v1/status"})


async def read_record(
    record: type[Body], request: Request, *, ignores_unsupported: bool = False
) -> Body:
    """The body as a record, by the rules of `parse_body`.

    Errors: RequestError 400, 413 or 415, or 499 when the client goes away.
    """
    return await read_translated(
        record, request, lambda body: body, ignores_unsupported=ignores_unsupported
    )


async def read_translated(
    record: type[Body],
    request: Request,
    translate: Callable[[Body], Result],
    *,
    ignores_unsupported: bool = False,
) -> Result:
    """The body as a record, translated; a large one is parsed and translated off the loop.

    Errors: RequestError 400, 413 or 415, or 499 when the client goes away.
    """
    data = await read_body(request, max_values=record.max_values)

    def work() -> Result:
        body = parse_body(record, data, ignores_unsupported=ignores_unsupported)
        return translate(body)

    if len(data) <= LARGE_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_PARSING, work)


def size_of_body(request: Request) -> int:
    """The bytes of the body, as far as it was read."""
    holding: _Holding = request.scope[_HOLDING]
    return holding.size_bytes


async def read_body(request: Request, *, max_values: int) -> bytes:
    """The body, of at most MAX_BODY_BYTES, with about `max_values` values and keys.

    One that is refused is read to its end, so that its client hears why.
    Errors: RequestError 400, 413 or 503, or 499 when the client goes away.
    """
    too_large = RequestError(
        413,
        f"the body is larger than {MAX_BODY_BYTES:,} bytes",
        code="body_too_large",
        hint="send less text",
    )
    with contextlib.suppress(ValueError):
        if int(request.headers.get("content-length", "0")) > MAX_BODY_BYTES:
            raise too_large
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError(
            415,
            "compressed request bodies are not accepted",
            code="unsupported_encoding",
            hint="send plain JSON",
        )

    data = bytearray()
    size_bytes = 0
    counter = ValueCounter()
    holding: _Holding = request.scope[_HOLDING]
    has_room = True
    try:
        async for part in request.stream():
            size_bytes += len(part)
            if size_bytes > MAX_BODY_BYTES:
                raise too_large

            has_room = has_room and holding.take(len(part))
            if counter.count > max_values or not has_room:
                data.clear()
                continue
            data += part
            for begin in range(0, len(part), _COUNTED_AT_ONCE):
                counter.feed(part[begin : begin + _COUNTED_AT_ONCE])
                await asyncio.sleep(0)
    except ClientDisconnect as error:
        raise RequestError(499, "the client went away", code="client_gone") from error

    if not has_room:
        raise RequestError(
            503,
            "the bodies of requests that are not answered yet take too much memory",
            code="too_much_unanswered",
            hint=f"try again in a moment; those of one user may have {BODIES_BYTES >> 20} MiB",
            retry_after_s=1,
        )
    if counter.count > max_values:
        raise RequestError(
            400,
            f"the body has more than {max_values:,} values and keys",
            code="too_many_values",
            hint="send fewer messages, tools or inputs at once",
        )
    return bytes(data)


def answer(record: Answer, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        pydantic_core.to_json(record),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def error_response(
    error: RequestError, form: Callable[[RequestError], dict[str, Any]] = error_body
) -> Response:
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else None
    return JSONResponse(form(error), status_code=error.status, headers=headers)


def refuse(request: Request, error: RequestError) -> Response:
    """The answer to a request that ended with this error, which is logged if it is our fault."""
    remember(request, error)
    if error.code == "model_not_found" and models_of(request):
        # The message names the models that there are, and this key is only for some of them.
        error = RequestError(
            error.status, "the model does not exist", code=error.code, param=error.param
        )
    return error_response(error, request.scope.get(ERROR_BODY, error_body))


def remember(request: Request, error: RequestError) -> None:
    """Log later why this request failed.

    That includes errors within a stream, whose status was sent before.
    """
    request.scope[_CAUSE] = error


def no_route(request: Request, refusal: HTTPException) -> Response:
    path = request.url.path
    what = "does not exist" if refusal.status_code == 404 else f"does not take {request.method}"
    hint = "GET /openapi.json lists what there is"
    if (ours := RIGHT_ONES.get(path)) is not None:
        hint = f"use {ours}, OpenAI's endpoint, which takes another body"
    elif allowed := (refusal.headers or {}).get("Allow"):
        hint = f"use {allowed}"
    elif near := meant(path, (route.path for route in request.app.routes)):
        hint = f"did you mean {near}? {hint}"
    response = error_response(
        RequestError(
            refusal.status_code,
            f"{path} {what}",
            code="unknown_url",
            hint=hint,
        )
    )
    response.headers.update(refusal.headers or {})
    return response


DEFECT = RequestError(500, "internal error; the daemon's log says more", code="internal_error")


def _traceback(error: BaseException) -> str:
    """As Python prints it, without the messages of the exceptions: they may quote a prompt."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        context = None if cause.__suppress_context__ else cause.__context__
        cause = cause.__cause__ or context

    lines: list[str] = []
    for cause in reversed(chain):
        lines += ["Traceback (most recent call last):\n", *traceback.format_tb(cause.__traceback__)]
        lines.append(f"{type(cause).__module__}.{type(cause).__qualname__}\n")
    return "".join(lines).rstrip("\n")


class _Holding:
    """The memory of one request's body, of the caller's share."""

    def __init__(self, share: Share, scope: Scope) -> None:
        self._share = share
        self._scope = scope
        self._caller = NOBODY
        self.size_bytes = 0

    def take(self, size_bytes: int) -> bool:
        if not self.size_bytes:
            self._caller = caller_in(self._scope)  # by now its key is known, if it has one
        if not self._share.take(self._caller, size_bytes):
            return False
        self.size_bytes += size_bytes
        return True

    def give_back(self) -> None:
        self._share.give_back(self._caller, self.size_bytes)


class Exchanges:
    """ASGI: gives every answer an X-Request-Id and logs each exchange.

    The id is the client's own, where it sent a usable one. The log has the uid and pid of the
    client, as the kernel knows them, or over TCP its address and the name of its key, and never a
    text. It has the cause of every answer with a status of 500 or more: in one sentence at warning,
    or with its traceback at error for a defect.
    """

    def __init__(
        self, app: ASGIApp, bodies: Share, count: Callable[[str, int], None] | None = None
    ) -> None:
        """`bodies`: the bytes of memory for bodies of requests, until they are answered.

        `count`: is called with the key's name, which may be empty, and the status of each answer
        over TCP.
        """
        self._app = app
        self._bodies = bodies
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        request_id = _request_id(scope)
        holding = scope[_HOLDING] = _Holding(self._bodies, scope)
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001 - a defect; the client has its 500
            log.error(
                "request crashed",
                path=shown_path(scope["path"]),
                error=type(error).__name__,
                request_id=request_id,
                exception=_traceback(error),
            )
        else:
            _log_cause(scope, status, request_id)
        finally:
            holding.give_back()
            peer = scope.get("state", {}).get(PEER, {})
            if self._count is not None and TCP in scope.get("state", {}):
                self._count(peer.get("key", ""), status or 499)
            is_probe = scope["path"] in _PROBES and status not in (401, 403)
            write = log.debug if is_probe else log.info
            write(
                "request",
                method=scope["method"],
                path=shown_path(scope["path"]),
                status=status or None,
                took_ms=round((time.monotonic() - started) * 1000, 1),
                request_id=request_id,
                **peer,
            )


def shown_path(path: str) -> str:
    """A path in a log line: that of a client may have hundreds of kilobytes."""
    return path if len(path) <= MAX_SHOWN_LETTERS else f"{path[:MAX_SHOWN_LETTERS]}..."


def _request_id(scope: Scope) -> str:
    given = b""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = value
            break

    return usable_id(given.decode("latin-1"))


def _log_cause(scope: Scope, status: int, request_id: str) -> None:
    # The error leads to the frames that it went through, hence to the body and back to the scope:
    # some megabytes that would wait for the garbage collector.
    cause: RequestError | None = scope.pop(_CAUSE, None)
    if cause is not None and cause.status >= 500:
        log.warning(
            "request failed",
            path=shown_path(scope["path"]),
            status=status,
            code=cause.code,
            error=cause.message,
            hint=cause.hint,
            request_id=request_id,
        )
