"""Handlers of inference, models and the daemon itself, and the app made of all endpoints.

A handler reads its request, asks serving or the reconciler, and writes the answer in OpenAI's
shapes. Every expected failure becomes OpenAI's error envelope. A client that goes away stops its
generation.
"""

from __future__ import annotations

import base64
import functools
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from rkcached.api.bodies import error_body
from rkcached.api.bundle_routes import BundleApi
from rkcached.api.cache_routes import CacheApi
from rkcached.api.callers import caller_of, check_model, may_use, viewer_of
from rkcached.api.endpoints import (
    EVENT_STREAM,
    declared_endpoint,
    describe,
    endpoint,
    endpoints_of,
    routes,
)
from rkcached.api.exchange import (
    BODIES_BYTES,
    DEFECT,
    Exchanges,
    answer,
    error_response,
    no_route,
    read_record,
    refuse,
)
from rkcached.api.framing import Framing
from rkcached.api.inference import Inference, floats_of
from rkcached.api.key_check import KeyCheck
from rkcached.api.metrics import CONTENT_TYPE, Metrics
from rkcached.api.named_prompt import prompt_text
from rkcached.api.own_site import OwnSite
from rkcached.api.page.page import page
from rkcached.api.page.prompt import prompt_view
from rkcached.api.page.view import rows_of, view_of
from rkcached.api.prepare import Preparation
from rkcached.api.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    RerankRequest,
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
    RankedDocument,
    RankedText,
    Ranking,
    Readiness,
    Status,
    TextCompletion,
)
from rkcached.api.shares import Share
from rkcached.api.status import Recent, pieces
from rkcached.api.streamed import Streamed
from rkcached.api.suggest_routes import SuggestApi
from rkcached.api.writer import ChatWriter, CompletionWriter, sse
from rkcached.errors import ManifestError, RequestError
from rkcached.host.logs import log
from rkcached.reconcile.events import Event, Events
from rkcached.reconcile.loop import Reconciler
from rkcached.serving.dispatcher import Serving
from rkcached.serving.models import find_model
from rkcached.sources.access_keys import AccessKeys
from rkcached.sources.records import Key

EVENT_STREAMS = 32
"""Of one user; of all users together four times as many."""

HEARTBEAT_S = 15.0
"""A client of the event stream that went away is noticed after this time at the latest."""

_FAILURES = (404, 409, 422, 502, 503, 504)  # of requests that a model answers


class Api:
    """The routes over one daemon's parts."""

    def __init__(
        self,
        *,
        reconciler: Reconciler,
        preparation: Preparation,
        inference: Inference,
        caches: CacheApi,
        suggestions: SuggestApi,
        bundles: BundleApi,
        surfaces: Sequence[object],
        events: Events,
        metrics: Metrics,
        make_status: Callable[..., Status],
        reload: Callable[[], Awaitable[None]],
        keys: AccessKeys,
        open_loopback: bool,
        serving: Serving,
        recent: Recent,
        socket: Path,
    ) -> None:
        """`surfaces` have endpoints of other interfaces. `socket` is the one for everybody.

        `open_loopback`: connections to a loopback address need no key.
        """
        self._reconciler = reconciler
        self._preparation = preparation
        self._inference = inference
        self._surfaces = surfaces
        self._caches = caches
        self._suggestions = suggestions
        self._bundles = bundles
        self._events = events
        self._metrics = metrics
        self._status = make_status
        self._reload = reload
        self._keys = keys
        self._open_loopback = open_loopback
        self._serving = serving
        self._recent = recent
        self._socket = socket
        self._logged_starting = False
        self._bodies = Share(each=BODIES_BYTES, total=2 * BODIES_BYTES)
        self._streams = Share(each=EVENT_STREAMS, total=4 * EVENT_STREAMS)

    def close(self) -> None:
        """Refuse the requests that are still being prepared."""
        self._preparation.close()

    def app(self, *, admin_socket: Path | None = None) -> ASGIApp:
        """All endpoints; with `admin_socket`, those that change something are refused."""

        @functools.cache
        def description() -> dict[str, Any]:  # takes 50 ms, and few ask
            return describe(endpoints, everyone=admin_socket is not None)

        @endpoint(
            "GET", "/openapi.json", summary="This description.", answers={200: ApiDescription}
        )
        async def openapi(_: Request) -> Response:
            return JSONResponse(description())

        endpoints = [
            *endpoints_of(self),
            *endpoints_of(self._caches),
            *endpoints_of(self._suggestions),
            *endpoints_of(self._bundles),
            *itertools.chain.from_iterable(map(endpoints_of, self._surfaces)),
            declared_endpoint(openapi),
        ]
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
        app.state.is_admin = admin_socket is None
        checked = KeyCheck(
            app, self._keys, open_loopback=self._open_loopback, for_admins=admin_socket is None
        )
        origins = tuple if admin_socket is None else self._origins
        own = OwnSite(checked, self._hosts, origins)
        return Exchanges(Framing(own), self._bodies, self._metrics.count_tcp)

    def _origins(self) -> tuple[str, ...]:
        return self._reconciler.snapshot.manifest.serving.cors

    def _hosts(self) -> Collection[str]:
        return self._reconciler.snapshot.manifest.serving.hosts

    # Inference

    @endpoint(
        "POST",
        "/v1/chat/completions",
        summary="Answer a conversation.",
        body=ChatRequest,
        answers={200: ChatCompletion},
        media=(EVENT_STREAM,),
        errors=_FAILURES,
    )
    async def _chat(self, request: Request) -> Response:
        accepted = time.monotonic()
        tolerant = self._preparation.ignores_unsupported
        body = await read_record(ChatRequest, request, ignores_unsupported=tolerant)
        writer_for = functools.partial(ChatWriter, body)
        return await self._inference.chat(request, body, writer_for, accepted=accepted)

    @endpoint(
        "POST",
        "/v1/completions",
        summary="Go on with a text.",
        body=CompletionRequest,
        answers={200: TextCompletion},
        media=(EVENT_STREAM,),
        errors=_FAILURES,
    )
    async def _complete(self, request: Request) -> Response:
        accepted = time.monotonic()
        tolerant = self._preparation.ignores_unsupported
        body = await read_record(CompletionRequest, request, ignores_unsupported=tolerant)
        return await self._inference.complete(
            request, body, CompletionWriter(body), accepted=accepted
        )

    @endpoint(
        "POST",
        "/v1/embeddings",
        summary="Make vectors of texts.",
        body=EmbeddingRequest,
        answers={200: EmbeddingList},
        errors=_FAILURES,
    )
    async def _embed(self, request: Request) -> Response:
        body = await read_record(EmbeddingRequest, request)
        result = await self._inference.embed(request, body)
        if isinstance(result, Response):
            return result

        vectors, tokens = result
        encode = _base64 if body.encoding_format == "base64" else floats_of
        data = [
            OneEmbedding(index=at, embedding=encode(vector)) for at, vector in enumerate(vectors)
        ]
        usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
        return answer(EmbeddingList(data=data, model=body.model, usage=usage))

    @endpoint(
        "POST",
        "/v1/rerank",
        summary="Order documents by how well they answer a query.",
        body=RerankRequest,
        answers={200: Ranking},
        errors=_FAILURES,
    )
    async def _rerank(self, request: Request) -> Response:
        body = await read_record(RerankRequest, request)
        result = await self._inference.rank(request, body)
        if isinstance(result, Response):
            return result

        scores, tokens = result
        texts = body.texts()
        best_first = sorted(range(len(scores)), key=lambda at: -scores[at])
        documents = [
            RankedDocument(
                index=at,
                relevance_score=scores[at],
                document=RankedText(text=texts[at]) if body.return_documents else None,
            )
            for at in best_first[: body.top_n]
        ]
        usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
        name = f"rerank-{uuid.uuid4().hex}"
        return answer(Ranking(id=name, model=body.model, results=documents, usage=usage))

    # Models

    @endpoint(
        "GET",
        "/v1/models",
        summary="Models, and their prompts that can be used as `model/prompt`.",
        answers={200: ModelList},
    )
    async def _models(self, request: Request) -> Response:
        desired = self._reconciler.snapshot.seen_by(viewer_of(request)).desired
        usable = [str(key) for key in desired.prompts if key in desired.texts]
        names = [*desired.models, *usable]
        names = [name for name in names if may_use(request, name)]
        return answer(ModelList(data=[ModelCard(id=name) for name in names]))

    @endpoint(
        "GET",
        "/v1/models/{name:path}",
        summary="One of them.",
        answers={200: ModelCard},
        errors=(404, 503),
    )
    async def _model(self, request: Request) -> Response:
        snapshot = self._reconciler.snapshot.seen_by(viewer_of(request))
        check_model(request, request.path_params["name"])
        name, _, prompt = request.path_params["name"].partition("/")
        find_model(snapshot, name)
        if prompt:
            prompt_text(snapshot, Key(name, prompt), "model")
        return answer(ModelCard(id=request.path_params["name"]))

    # The daemon

    @endpoint(
        "POST",
        "/v1/reload",
        summary="Read the manifest and look at everything again.",
        answers={200: ManifestReloaded},
        errors=(422,),
        admin=True,
    )
    async def _post_reload(self, request: Request) -> Response:
        try:
            await self._reload()
        except ManifestError as error:
            refusal = RequestError(422, error.message, code="manifest_rejected", hint=error.hint)
            body = error_body(refusal)
            body["error"]["problems"] = [asdict(problem) for problem in error.problems]
            return JSONResponse(body, status_code=422)
        return answer(ManifestReloaded(summary=self._status(viewer=viewer_of(request)).summary))

    @endpoint(
        "GET",
        "/v1/status",
        summary="What the daemon is and does.",
        answers={200: Status},
        of_all_models=True,
    )
    async def _get_status(self, request: Request) -> Response:
        if request.query_params.get("look") == "true" and self._reconciler.snapshot.ready:
            await self._reconciler.next_look()
        status = self._status(viewer=viewer_of(request))
        return Streamed(pieces(status), media_type="application/json")

    @endpoint(
        "GET",
        "/",
        summary="The same as a page for a browser, which follows the events.",
        answers={200: None},
        media=("text/html",),
        of_all_models=True,
    )
    async def _page(self, request: Request) -> Response:
        view = view_of(request.query_params)
        viewer = viewer_of(request)
        snapshot = self._reconciler.snapshot.seen_by(viewer)
        rows = rows_of(view, snapshot, self._serving.tally.uses)
        about = None
        if view.prompt:
            about = prompt_view(
                view.prompt,
                snapshot,
                self._serving,
                functools.partial(self._recent.of_prompt, viewer=viewer),
                viewer=viewer,
                socket=self._socket,
                origin=f"http://{request.headers.get('host', 'localhost')}",
            )
        return page(self._status(viewer=viewer, keys=rows.keys), view, rows, about)

    @endpoint(
        "GET",
        "/v1/events",
        summary="Every change of a prompt, a build, a worker or the summary, and every answer, "
        "as it happens.",
        answers={200: None},
        media=(EVENT_STREAM,),
        of_all_models=True,
    )
    async def _get_events(self, request: Request) -> Response:
        waits_for = request.query_params.getlist("waits_for")
        hurrying = self._reconciler.hurrying(waits_for)
        caller = caller_of(request)
        shown = functools.partial(self._as_seen, viewer_of(request))
        if not self._streams.take(caller):
            raise RequestError(
                503,
                f"too many event streams are open: {EVENT_STREAMS} are allowed for a user, and "
                f"{4 * EVENT_STREAMS} for all",
                code="too_many_streams",
                hint="close some of them",
                retry_after_s=1,
            )
        stream = _event_stream(self._events, hurrying, shown)
        closing = functools.partial(self._streams.give_back, caller)
        return Streamed(stream, media_type=EVENT_STREAM, at_end=closing)

    def _as_seen(self, viewer: int | None, event: Event) -> Event | None:
        """The event as this user may see it; None if it is about what is another user's.

        The figures of an answer tell what was asked before it.
        """
        if event.kind == "answer":
            fields = dict(event.fields)
            owner = fields.pop("owner")
            return replace(event, fields=fields) if viewer in (None, owner) else None

        prompt = event.fields.get("prompt")
        if prompt is None:
            return event
        key = Key(event.fields["model"], prompt)
        return event if self._reconciler.snapshot.may_see(viewer, key) else None

    @endpoint(
        "GET",
        "/metrics",
        summary="For Prometheus.",
        answers={200: None},
        media=("text/plain",),
        of_all_models=True,
    )
    async def _get_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    @endpoint(
        "GET",
        "/healthz",
        summary="Is the daemon alive?",
        answers={200: Health},
    )
    async def _healthz(self, _: Request) -> Response:
        return answer(Health())

    @endpoint(
        "GET",
        "/readyz",
        summary="Does the first plan exist?",
        answers={200: Readiness, 503: Readiness},
    )
    async def _readyz(self, _: Request) -> Response:
        if self._reconciler.snapshot.ready:
            return answer(Readiness(status="ready"))

        if not self._logged_starting:
            self._logged_starting = True  # once: who waits for the daemon asks each second
            log.warning("not ready", status=503, reason="not all files have been read yet")
        return answer(Readiness(status="starting"), status=503)


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()


async def _event_stream(
    events: Events,
    hurrying: AbstractContextManager[None],
    as_seen: Callable[[Event], Event | None],
) -> AsyncGenerator[bytes, None]:
    """Server-sent events, with a comment at once and after each silence.

    The first comment shows the client that the stream has begun. What the client waits for is
    hurried until it goes.
    """
    with hurrying:
        yield b": listening\n\n"
        async for event in events.stream(HEARTBEAT_S):
            if event is None:
                yield b": still here\n\n"
            elif (seen := as_seen(event)) is not None:
                data = {"time": round(seen.time, 3), **seen.fields}
                yield f"event: {seen.kind}\n".encode() + sse(data)
