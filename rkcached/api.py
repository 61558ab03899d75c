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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from rkcached.cache_api import CacheApi, admin_only
from rkcached.errors import ManifestError, RequestError
from rkcached.events import Events
from rkcached.exchange import RequestIds, defect, error_response, no_route, read_body
from rkcached.metrics import CONTENT_TYPE, Metrics
from rkcached.openai import ChatRequest, CompletionRequest, GenerationRequest, error_body, parse_body
from rkcached.plan import Key
from rkcached.preparation import Job
from rkcached.reconcile import Reconciler
from rkcached.serving import End, Serving, Text

log = structlog.get_logger()

HEARTBEAT_S = 15.0
"""A client of the event stream that went away is noticed at the latest after this."""

Result = TypeVar("Result")


class Api:
    """The routes over one daemon's parts."""

    def __init__(
        self,
        *,
        reconciler: Reconciler,
        serving: Serving,
        caches: CacheApi,
        events: Events,
        metrics: Metrics,
        make_status: Callable[[], dict[str, Any]],
        reload: Callable[[], Awaitable[None]],
    ) -> None:
        self._caches = caches
        self._events = events
        self._metrics = metrics
        self._reconciler = reconciler
        self._serving = serving
        self._status = make_status
        self._reload = reload

    def app(self, *, admin_socket: Path | None = None) -> ASGIApp:
        """All routes; with `admin_socket`, those that change something are refused and referred to it."""
        routes = [
            Route("/healthz", self._healthz),
            Route("/v1/status", self._get_status),
            Route("/readyz", self._readyz),
            Route("/metrics", self._get_metrics),
            Route("/v1/events", self._get_events),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route(
                "/v1/reload", self._post_reload if admin_socket is None else admin_only(admin_socket), methods=["POST"]
            ),
            *self._caches.routes(admin_socket=admin_socket),
            Route("/v1/models/{name:path}", self._model),
        ]
        handlers: dict[Any, Callable[[Request, Any], Response]] = {
            RequestError: lambda _, error: error_response(error),
            404: lambda request, _: error_response(no_route(request, 404)),
            405: lambda request, _: error_response(no_route(request, 405)),
            Exception: defect,
        }
        return RequestIds(Starlette(routes=routes, exception_handlers=handlers))

    async def _healthz(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _readyz(self, _: Request) -> Response:
        ready = self._reconciler.looked.is_set()
        return JSONResponse({"status": "ready" if ready else "starting"}, status_code=200 if ready else 503)

    async def _get_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def _get_events(self, _: Request) -> Response:
        return StreamingResponse(_event_stream(self._events), media_type="text/event-stream")

    async def _get_status(self, _: Request) -> Response:
        return JSONResponse(self._status())

    async def _post_reload(self, _: Request) -> Response:
        try:
            await self._reload()
        except ManifestError as error:
            refusal = RequestError(422, error.message, code="manifest_rejected", hint=error.hint)
            said = error_body(refusal)
            said["error"]["problems"] = [asdict(problem) for problem in error.problems]
            return JSONResponse(said, status_code=422)
        return JSONResponse({"object": "manifest.reloaded", "summary": self._status()["summary"]})

    async def _models(self, _: Request) -> Response:
        view = self._reconciler.view
        names = [*view.desired.models, *(str(key) for key in view.desired.prompts)]
        return JSONResponse({"object": "list", "data": [_model_record(name) for name in names]})

    async def _model(self, request: Request) -> Response:
        name, _, prompt = request.path_params["name"].partition("/")
        self._serving.preparation.model(name)
        if prompt and Key(name, prompt) not in self._reconciler.view.desired.prompts:
            raise RequestError(
                404, f"the model {name!r} has no prompt {prompt!r}", code="prompt_not_found", param="model"
            )
        return JSONResponse(_model_record(request.path_params["name"]))

    async def _chat(self, request: Request) -> Response:
        accepted = time.monotonic()
        body = parse_body(ChatRequest, await read_body(request))
        return await self._answer(request, body, self._serving.preparation.chat(body, accepted), _CHAT)

    async def _complete(self, request: Request) -> Response:
        accepted = time.monotonic()
        body = parse_body(CompletionRequest, await read_body(request))
        return await self._answer(request, body, self._serving.preparation.completion(body, accepted), _COMPLETION)

    async def _answer(self, request: Request, body: GenerationRequest, job: Job, shape: _Shape) -> Response:
        answer = self._serving.run(job)
        head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if not body.stream:
            return await _unless_gone(request, _whole(answer, head, shape))
        # The first event decides between an error status and a stream.
        first = await _unless_gone(request, anext(answer))
        if isinstance(first, Response):
            await answer.aclose()
            return first
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(
            _stream(first, answer, head, shape, with_usage=with_usage), media_type="text/event-stream"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """How an endpoint words its answers."""

    prefix: str
    whole: str
    chunk: str
    text: Callable[[str], dict[str, Any]]
    """Of a whole answer's choice."""
    delta: Callable[[str, bool], dict[str, Any]]
    """Of a chunk's choice: the piece, and whether it is the first."""


def _delta(text: str, first: bool) -> dict[str, Any]:
    return {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text else {})}


_CHAT = _Shape(
    prefix="chatcmpl",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    text=lambda text: {"message": {"role": "assistant", "content": text}},
    delta=_delta,
)
_COMPLETION = _Shape(
    prefix="cmpl",
    whole="text_completion",
    chunk="text_completion",
    text=lambda text: {"text": text},
    delta=lambda text, _: {"text": text},
)


def _model_record(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "rkcached"}


async def _whole(answer: AsyncIterator[Text | End], head: dict[str, Any], shape: _Shape) -> Response:
    pieces = []
    async for event in answer:
        if isinstance(event, Text):
            pieces.append(event.text)
        else:
            return JSONResponse(
                {
                    **head,
                    "object": shape.whole,
                    "choices": [
                        {
                            "index": 0,
                            **shape.text("".join(pieces)),
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
    first: Text | End, rest: AsyncGenerator[Text | End, None], head: dict[str, Any], shape: _Shape, *, with_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events. Left early (the client went away), it closes `rest`, which stops the generation."""

    def chunk(text: str, finish: str | None = None, **more: Any) -> bytes:
        choices = [{"index": 0, **shape.delta(text, lead), "logprobs": None, "finish_reason": finish}]
        return _sse({**head, "object": shape.chunk, "choices": choices, **more})

    async def events() -> AsyncIterator[Text | End]:
        yield first
        async for event in rest:
            yield event

    lead = True
    try:
        async for event in events():
            if isinstance(event, Text):
                yield chunk(event.text)
                lead = False
            else:
                yield chunk("", event.finish.value, rkcached=event.report.model_dump())
                if with_usage:
                    usage = event.usage.model_dump()
                    yield _sse({**head, "object": shape.chunk, "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"
    except RequestError as error:
        yield _sse(error_body(error))
    finally:
        with contextlib.suppress(RequestError):
            await rest.aclose()


async def _event_stream(events: Events) -> AsyncIterator[bytes]:
    """Server-sent events; a comment first, so that the client knows that it is heard, and after each silence."""
    yield b": listening\n\n"
    async for event in events.stream(HEARTBEAT_S):
        if event is None:
            yield b": still here\n\n"
        else:
            yield f"event: {event.kind}\n".encode() + _sse({"time": round(event.time, 3), **event.fields})


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


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
