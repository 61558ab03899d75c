"""HTTP routes.

Reads a request, asks serving or the reconciler, writes the answer in OpenAI's shapes.

Every expected failure becomes OpenAI's error envelope. A client that goes away stops its
generation.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from rkcached.api.bodies import error_body
from rkcached.api.cache_routes import CacheApi
from rkcached.api.endpoints import EVENT_STREAM, Endpoint, describe, routes
from rkcached.api.exchange import (
    DEFECT,
    Exchanges,
    Streamed,
    answer,
    error_response,
    no_route,
    read_record,
    refuse,
    remember,
    unless_gone,
)
from rkcached.api.metrics import CONTENT_TYPE, Metrics
from rkcached.api.page import page
from rkcached.api.prepare import Preparation
from rkcached.api.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerationRequest,
)
from rkcached.api.responses import (
    ApiDescription,
    ChatCompletion,
    EmbeddingList,
    EmbeddingUsage,
    Health,
    ManifestReloaded,
    ModelCard,
    ModelList,
    OneEmbedding,
    Readiness,
    Status,
    TextCompletion,
)
from rkcached.api.status import pieces
from rkcached.api.writer import ChatWriter, CompletionWriter, Writer
from rkcached.errors import ManifestError, RequestError
from rkcached.reconcile.events import Events
from rkcached.reconcile.loop import Reconciler
from rkcached.serving.dispatcher import Serving
from rkcached.serving.embeddings import Embeddings
from rkcached.serving.job import End, Job, Text
from rkcached.serving.models import find_model
from rkcached.sources.records import Key

log = structlog.get_logger()

HEARTBEAT_S = 15.0
"""A client of the event stream that went away is noticed at the latest after this."""


class Api:
    """The routes over one daemon's parts."""

    def __init__(
        self,
        *,
        reconciler: Reconciler,
        serving: Serving,
        preparation: Preparation,
        caches: CacheApi,
        embeddings: Embeddings,
        events: Events,
        metrics: Metrics,
        make_status: Callable[..., Status],
        reload: Callable[[], Awaitable[None]],
    ) -> None:
        self._told_starting = False
        self._embeddings = embeddings
        self._caches = caches
        self._events = events
        self._metrics = metrics
        self._reconciler = reconciler
        self._serving = serving
        self._preparation = preparation
        self._status = make_status
        self._reload = reload

    def close(self) -> None:
        """Refuse the requests that are still being prepared."""
        self._preparation.close()

    def app(self, *, admin_socket: Path | None = None) -> ASGIApp:
        """All endpoints; with `admin_socket`, those that change something are refused and referred to it."""

        @functools.cache
        def description() -> dict[str, Any]:  # takes 50 ms, and few ask
            return describe(endpoints, everyone=admin_socket is not None)

        async def openapi(_: Request) -> Response:
            return JSONResponse(description())

        summary = "This description."
        itself = Endpoint(
            method="GET",
            path="/openapi.json",
            handler=openapi,
            summary=summary,
            answers={200: ApiDescription},
        )
        endpoints = [*self._endpoints(), itself]
        handlers: dict[Any, Callable[[Request, Any], Response]] = {
            RequestError: refuse,
            404: no_route,
            405: no_route,
            Exception: lambda _, __: error_response(DEFECT),
        }
        app = Starlette(
            routes=routes(endpoints, admin_socket=admin_socket), exception_handlers=handlers
        )
        app.router.redirect_slashes = False
        return Exchanges(app)

    def _endpoints(self) -> list[Endpoint]:
        refusals = (404, 409, 422, 502, 503, 504)
        """Of requests that a model answers."""
        return [
            Endpoint(
                method="POST",
                path="/v1/chat/completions",
                handler=self._chat,
                summary="Answer a conversation.",
                body=ChatRequest,
                answers={200: ChatCompletion},
                media=(EVENT_STREAM,),
                errors=refusals,
            ),
            Endpoint(
                method="POST",
                path="/v1/completions",
                handler=self._complete,
                summary="Go on with a text.",
                body=CompletionRequest,
                answers={200: TextCompletion},
                media=(EVENT_STREAM,),
                errors=refusals,
            ),
            Endpoint(
                method="POST",
                path="/v1/embeddings",
                handler=self._embed,
                summary="Make vectors of texts.",
                body=EmbeddingRequest,
                answers={200: EmbeddingList},
                errors=refusals,
            ),
            Endpoint(
                method="GET",
                path="/v1/models",
                handler=self._models,
                summary="Models, and their prompts as `model/prompt`.",
                answers={200: ModelList},
            ),
            *self._caches.endpoints(),
            Endpoint(
                method="POST",
                path="/v1/reload",
                handler=self._post_reload,
                summary="Read the manifest and look at everything again.",
                answers={200: ManifestReloaded},
                errors=(422,),
                changes=True,
            ),
            Endpoint(
                method="GET",
                path="/v1/models/{name:path}",
                handler=self._model,
                summary="One of them.",
                answers={200: ModelCard},
                errors=(404, 503),
            ),
            Endpoint(
                method="GET",
                path="/v1/status",
                handler=self._get_status,
                summary="What the daemon is and does.",
                answers={200: Status},
            ),
            Endpoint(
                method="GET",
                path="/",
                handler=self._page,
                summary="The same as a page for a browser, which follows the events.",
                answers={200: None},
                media=("text/html",),
            ),
            Endpoint(
                method="GET",
                path="/v1/events",
                handler=self._get_events,
                summary="Every change of a prompt, a build, a worker or the summary, and every answer, as it happens.",
                answers={200: None},
                media=(EVENT_STREAM,),
            ),
            Endpoint(
                method="GET",
                path="/metrics",
                handler=self._get_metrics,
                summary="For Prometheus.",
                answers={200: None},
                media=("text/plain",),
            ),
            Endpoint(
                method="GET",
                path="/healthz",
                handler=self._healthz,
                summary="Is the daemon alive?",
                answers={200: Health},
            ),
            Endpoint(
                method="GET",
                path="/readyz",
                handler=self._readyz,
                summary="Does the first plan exist?",
                answers={200: Readiness, 503: Readiness},
            ),
        ]

    async def _healthz(self, _: Request) -> Response:
        return answer(Health())

    async def _readyz(self, _: Request) -> Response:
        ready = self._reconciler.snapshot.ready
        if not ready and not self._told_starting:
            self._told_starting = True  # once: whoever waits for it asks each second
            log.warning("not ready", status=503, reason="not all files have been read yet")
        return answer(
            Readiness(status="ready" if ready else "starting"), status=200 if ready else 503
        )

    async def _get_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def _get_events(self, _: Request) -> Response:
        return Streamed(_event_stream(self._events), media_type=EVENT_STREAM)

    async def _get_status(self, request: Request) -> Response:
        if request.query_params.get("look") == "true" and self._reconciler.snapshot.ready:
            await self._reconciler.next_look()
        return Streamed(pieces(self._status()), media_type="application/json")

    async def _page(self, _: Request) -> Response:
        return page(self._status(urgent_first=True))

    async def _post_reload(self, _: Request) -> Response:
        try:
            await self._reload()
        except ManifestError as error:
            refusal = RequestError(422, error.message, code="manifest_rejected", hint=error.hint)
            said = error_body(refusal)
            said["error"]["problems"] = [asdict(problem) for problem in error.problems]
            return JSONResponse(said, status_code=422)
        return answer(ManifestReloaded(summary=self._status().summary))

    async def _models(self, _: Request) -> Response:
        snapshot = self._reconciler.snapshot
        names = [*snapshot.desired.models, *(str(key) for key in snapshot.desired.prompts)]
        return answer(ModelList(data=[ModelCard(id=name) for name in names]))

    async def _model(self, request: Request) -> Response:
        name, _, prompt = request.path_params["name"].partition("/")
        find_model(self._reconciler.snapshot, name)
        if prompt and Key(name, prompt) not in self._reconciler.snapshot.desired.prompts:
            raise RequestError(
                404,
                f"the model {name!r} has no prompt {prompt!r}",
                code="prompt_not_found",
                param="model",
            )
        return answer(ModelCard(id=request.path_params["name"]))

    async def _chat(self, request: Request) -> Response:
        accepted = time.monotonic()
        body = await read_record(ChatRequest, request)
        job, reply = await self._preparation.chat(body, accepted)
        writer = ChatWriter(body.model, reply, one_call=body.parallel_tool_calls is False)
        return await self._answer(request, body, job, writer)

    async def _complete(self, request: Request) -> Response:
        accepted = time.monotonic()
        body = await read_record(CompletionRequest, request)
        job = self._preparation.completion(body, accepted)
        return await self._answer(request, body, job, CompletionWriter(body.model))

    async def _embed(self, request: Request) -> Response:
        body = await read_record(EmbeddingRequest, request)
        model, inputs = self._preparation.embedding(body)
        made = await unless_gone(request, self._embeddings.make(model, inputs))
        if isinstance(made, Response):
            return made
        vectors, tokens = made
        plain = body.encoding_format != "base64"
        data = [
            OneEmbedding(
                index=at, embedding=_floats(vector) if plain else base64.b64encode(vector).decode()
            )
            for at, vector in enumerate(vectors)
        ]
        usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
        return answer(EmbeddingList(data=data, model=body.model, usage=usage))

    async def _answer(
        self, request: Request, body: GenerationRequest, job: Job, writer: Writer
    ) -> Response:
        events = self._serving.run(job)
        if not body.stream:
            return await unless_gone(request, _whole(events, writer))
        # The first event decides between an error status and a stream.
        first = await unless_gone(request, anext(events))
        if isinstance(first, Response):
            await events.aclose()
            return first
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        stream = _stream(first, events, writer, request, with_usage=with_usage)
        return Streamed(stream, media_type=EVENT_STREAM)


async def _whole(events: AsyncIterator[Text | End], writer: Writer) -> Response:
    pieces: list[Text] = []
    async for event in events:
        if isinstance(event, End):
            return answer(writer.whole(pieces, event))
        pieces.append(event)
    raise RuntimeError("an answer without an end")


async def _stream(
    first: Text | End,
    rest: AsyncGenerator[Text | End, None],
    writer: Writer,
    request: Request,
    *,
    with_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """Server-sent events.

    Left early (the client went away), it closes `rest`, which stops the generation.
    """

    async def events() -> AsyncIterator[Text | End]:
        yield first
        async for event in rest:
            yield event

    try:
        async for event in events():  # each event is one write: it wakes the client once
            if isinstance(event, Text):
                chunks = [_sse(chunk) for chunk in writer.chunks(event)]
            else:
                usage = [writer.usage(event)] if with_usage else []
                chunks = [*map(_sse, [*writer.last(event), *usage]), b"data: [DONE]\n\n"]
            if chunks:
                yield b"".join(chunks)
    except RequestError as error:
        remember(request, error)
        yield _sse(error_body(error))
    finally:
        with contextlib.suppress(RequestError):
            await rest.aclose()


def _floats(vector: bytes) -> list[float]:
    """The numbers for JSON.

    numpy would be no quicker here, and take 20 MB of the daemon's memory for good.
    """
    return [value for (value,) in struct.iter_unpack("<f", vector)]


async def _event_stream(events: Events) -> AsyncGenerator[bytes, None]:
    """Server-sent events; a comment first, so that the client knows that it is heard, and after each silence."""
    yield b": listening\n\n"
    async for event in events.stream(HEARTBEAT_S):
        if event is None:
            yield b": still here\n\n"
        else:
            yield f"event: {event.kind}\n".encode() + _sse(
                {"time": round(event.time, 3), **event.fields}
            )


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
