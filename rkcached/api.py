"""HTTP routes. Reads a request, asks serving or the reconciler, writes the answer in OpenAI's shapes.

Every expected failure becomes OpenAI's error envelope. A client that goes away stops its generation.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rkcached import errors
from rkcached.errors import RequestError
from rkcached.openai import ChatRequest, RegenerateRequest, error_body, parse_body
from rkcached.plan import Key
from rkcached.reconcile import Reconciler
from rkcached.serving import End, Serving, Text

log = structlog.get_logger()

MAX_BODY_BYTES = 8 << 20

Result = TypeVar("Result")


class Api:
    """The routes over one daemon's parts."""

    def __init__(self, reconciler: Reconciler, serving: Serving, make_status: Callable[[], dict[str, Any]]) -> None:
        self._reconciler = reconciler
        self._serving = serving
        self._status = make_status

    def app(self) -> Starlette:
        routes = [
            Route("/healthz", self._healthz),
            Route("/v1/status", self._get_status),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/cache/{model}/generate-binary", self._regenerate, methods=["POST"]),
        ]
        handlers: dict[Any, Callable[[Request, Any], Response]] = {
            RequestError: lambda _, error: _error(error),
            404: lambda request, _: _error(_no_route(request, 404)),
            405: lambda request, _: _error(_no_route(request, 405)),
            Exception: _defect,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _healthz(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _get_status(self, _: Request) -> Response:
        return JSONResponse(self._status())

    async def _models(self, _: Request) -> Response:
        view = self._reconciler.view
        names = [*view.desired.models, *(str(key) for key in view.desired.prompts)]
        return JSONResponse(
            {
                "object": "list",
                "data": [{"id": name, "object": "model", "created": 0, "owned_by": "rkcached"} for name in names],
            }
        )

    async def _chat(self, request: Request) -> Response:
        accepted = time.monotonic()
        body = parse_body(ChatRequest, await _read_body(request))
        answer = self._serving.run(self._serving.prepare(body, accepted))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if not body.stream:
            return await _unless_gone(request, _whole(answer, head))
        # The first event decides between an error status and a stream.
        first = await _unless_gone(request, anext(answer))
        if isinstance(first, Response):
            await answer.aclose()
            return first
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(_stream(first, answer, head, with_usage=with_usage), media_type="text/event-stream")

    async def _regenerate(self, request: Request) -> Response:
        body = parse_body(RegenerateRequest, await _read_body(request))
        key = Key(request.path_params["model"], body.cache_name)
        try:
            artifact = await self._reconciler.regenerate(key)
        except errors.SourceError as error:
            missing = key not in self._reconciler.view.desired.prompts
            raise RequestError(
                404 if missing else 409,
                error.message,
                code="prompt_not_found" if missing else "prompt_blocked",
                hint=error.hint,
            ) from error
        except errors.RkcachedError as error:
            raise RequestError(503, error.message, code="build_failed", hint=error.hint) from error
        size_mb = artifact.sidecar.size_bytes / 1_000_000
        figures = artifact.sidecar.figures
        return JSONResponse(
            {
                "object": "binary_cache.created",
                "model": key.model,
                "cache_name": key.prompt,
                "size_mb": round(size_mb, 2),
                "ttft_ms": round(figures.warm_ttft_ms, 1),
                "timestamp": int(artifact.sidecar.built_at),
                "message": f"Binary cache generated successfully ({size_mb:.2f} MB)",
                "tokens": artifact.sidecar.tokens,
                "prefill_ms": round(figures.prefill_ms, 1),
                "cold_ttft_ms": round(figures.cold_ttft_ms, 1),
                "build_ms": round(artifact.sidecar.build_ms, 1),
            }
        )


async def _whole(answer: AsyncIterator[Text | End], head: dict[str, Any]) -> Response:
    pieces = []
    async for event in answer:
        if isinstance(event, Text):
            pieces.append(event.text)
        else:
            return JSONResponse(
                {
                    **head,
                    "object": "chat.completion",
                    "choices": [
                        {
                            "index": 0,
                            "message": {"role": "assistant", "content": "".join(pieces)},
                            "logprobs": None,
                            "finish_reason": event.finish.value,
                        }
                    ],
                    "usage": event.usage.model_dump(),
                    "rkcached": event.report.model_dump(),
                }
            )
    raise RuntimeError("an answer without an end")


async def _stream(
    first: Text | End, rest: AsyncGenerator[Text | End, None], head: dict[str, Any], *, with_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events. Left early (the client went away), it closes `rest`, which stops the generation."""

    def chunk(delta: dict[str, str], finish: str | None = None, **more: Any) -> bytes:
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
        return _sse({**head, "object": "chat.completion.chunk", "choices": choices, **more})

    async def events() -> AsyncIterator[Text | End]:
        yield first
        async for event in rest:
            yield event

    lead = {"role": "assistant"}
    try:
        async for event in events():
            if isinstance(event, Text):
                yield chunk({**lead, "content": event.text})
                lead = {}
            else:
                yield chunk(lead, event.finish.value, rkcached=event.report.model_dump())
                if with_usage:
                    usage = event.usage.model_dump()
                    yield _sse({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"
    except RequestError as error:
        yield _sse(error_body(error))
    finally:
        with contextlib.suppress(RequestError):
            await rest.aclose()


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _read_body(request: Request) -> bytes:
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


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result | Response:
    """Wait for `work`, but stop it when the client goes away. Nobody reads the answer then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        log.info("client went away", path=request.url.path)
        return Response(status_code=499)
    finally:
        for pending in (task, gone):
            if not pending.done():
                pending.cancel()
                with contextlib.suppress(asyncio.CancelledError, RequestError):
                    await pending


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(error: RequestError) -> Response:
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else None
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


def _no_route(request: Request, status_code: int) -> RequestError:
    what = "does not exist" if status_code == 404 else f"does not take {request.method}"
    return RequestError(status_code, f"{request.url.path} {what}", code="unknown_url", hint="see GET /v1/status")


def _defect(request: Request, error: Exception) -> Response:
    log.error("request crashed", path=request.url.path, error=repr(error))
    return _error(RequestError(500, "internal error; the daemon's log says more", code="internal_error"))
