"""HTTP routes of prompt caches and of loaded models: the operations beside inference.

A text that a client stores is a file, a source like any other; the reconciler does the rest, and the call waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rkcached import errors
from rkcached.errors import RequestError
from rkcached.exchange import read_body
from rkcached.manifest import NAME, NAME_RULE
from rkcached.openai import GenerateBinaryRequest, ModelRequest, StoreRequest, parse_body
from rkcached.plan import Key
from rkcached.reconcile import Reconciler
from rkcached.serving import Serving
from rkcached.sidecar import StoredArtifact
from rkcached.sources import MAX_PROMPT_BYTES
from rkcached.status import model_status, prompt_status
from rkcached.stored import StoredTexts
from rkcached.worker.pool import Workers


class CacheApi:
    def __init__(self, reconciler: Reconciler, serving: Serving, workers: Workers, stored: StoredTexts) -> None:
        self._reconciler = reconciler
        self._serving = serving
        self._workers = workers
        self._stored = stored

    def routes(self, *, admin_socket: Path | None) -> list[Route]:
        """With `admin_socket`, changes are refused and referred to it."""
        routes = [
            Route("/v1/models/available", self._available),
            Route("/v1/models/loaded", self._loaded),
            Route("/v1/models/load", self._load, methods=["POST"]),
            Route("/v1/models/unload", self._unload, methods=["POST"]),
            Route("/v1/cache/{model}", self._list, methods=["GET"]),
            Route("/v1/cache/{model}", self._store, methods=["POST"]),
            Route("/v1/cache/{model}/generate-binary", self._generate_binary, methods=["POST"]),
            Route("/v1/cache/{model}/{name}", self._get, methods=["GET"]),
            Route("/v1/cache/{model}/{name}", self._delete, methods=["DELETE"]),
        ]
        if admin_socket is None:
            return routes
        refused = admin_only(admin_socket)
        changes = {"POST", "DELETE"}
        return [
            Route(route.path, refused, methods=list(route.methods or ()))
            if changes & (route.methods or set())
            else route
            for route in routes
        ]

    # Models

    async def _available(self, _: Request) -> Response:
        models = self._reconciler.view.desired.models
        return _list([model_status(name, model, self._workers) for name, model in models.items()])

    async def _loaded(self, _: Request) -> Response:
        models = self._reconciler.view.desired.models
        shown = [model_status(name, model, self._workers) for name, model in models.items()]
        return _list([model for model in shown if model["pid"] is not None])

    async def _load(self, request: Request) -> Response:
        body = parse_body(ModelRequest, await read_body(request))
        started = time.monotonic()
        await self._serving.load(body.model)
        return self._model_answer("model.loaded", body.model, started)

    async def _unload(self, request: Request) -> Response:
        body = parse_body(ModelRequest, await read_body(request))
        started = time.monotonic()
        await self._serving.unload(body.model)
        return self._model_answer("model.unloaded", body.model, started)

    def _model_answer(self, kind: str, name: str, started: float) -> Response:
        model = self._reconciler.view.desired.models.get(name)
        took_ms = round((time.monotonic() - started) * 1000, 1)
        return JSONResponse(
            {"object": kind, "model": name, "took_ms": took_ms, **model_status(name, model, self._workers)}
        )

    # Caches

    async def _list(self, request: Request) -> Response:
        model = self._known_model(request)
        keys = [key for key in self._reconciler.view.assessments if key.model == model]
        return _list([self._describe(key) for key in keys])

    async def _get(self, request: Request) -> Response:
        key = self._key(request, request.path_params["name"])
        if key not in self._reconciler.view.assessments:
            raise _no_cache(key)
        return JSONResponse(self._describe(key))

    async def _store(self, request: Request) -> Response:
        body = parse_body(StoreRequest, await read_body(request))
        key = self._key(request, body.cache_name)
        await self._write(key, body.content)
        if not body.wait:
            self._reconciler.look_again(now=True)
            location = f"/v1/cache/{key.model}/{key.prompt}"
            answer = {"object": "cache.accepted", "model": key.model, "cache_name": key.prompt, "location": location}
            return JSONResponse(answer, status_code=202, headers={"Location": location})
        await self._built(key, anew=False)
        return JSONResponse({"object": "cache.created", **self._describe(key)})

    async def _generate_binary(self, request: Request) -> Response:
        body = parse_body(GenerateBinaryRequest, await read_body(request))
        key = self._key(request, body.cache_name)
        if body.prompt is not None:
            await self._write(key, body.prompt)
        artifact = await self._built(key, anew=body.prompt is None)
        size_mb = artifact.sidecar.size_bytes / 1_000_000
        return JSONResponse(
            {
                "object": "binary_cache.created",
                "model": key.model,
                "cache_name": key.prompt,
                "size_mb": round(size_mb, 2),
                "ttft_ms": round(artifact.sidecar.figures.warm_ttft_ms, 1),
                "timestamp": int(artifact.sidecar.built_at),
                "message": f"Binary cache generated successfully ({size_mb:.2f} MB)",
                "tokens": artifact.sidecar.tokens,
                "prefill_ms": round(artifact.sidecar.figures.prefill_ms, 1),
                "cold_ttft_ms": round(artifact.sidecar.figures.cold_ttft_ms, 1),
                "build_ms": round(artifact.sidecar.build_ms, 1),
            }
        )

    async def _delete(self, request: Request) -> Response:
        key = self._key(request, request.path_params["name"])
        desired = self._reconciler.view.desired
        if key in desired.prompts and key not in desired.stored:
            raise _declared(key, "remove it there")
        try:
            deleted = await asyncio.to_thread(self._stored.delete, key)
        except errors.StoreError as error:
            raise RequestError(503, error.message, code="state_not_writable", hint=error.hint) from error
        if not deleted:
            raise _no_cache(key)
        await self._reconciler.next_look()
        return JSONResponse({"object": "cache.deleted", "model": key.model, "cache_name": key.prompt, "deleted": True})

    async def _write(self, key: Key, text: str) -> None:
        """Store a client's text. Errors: RequestError."""
        if not text.strip():
            raise RequestError(400, "the prompt is empty", code="empty_prompt", param="content", hint="send its text")
        size = len(text.encode(errors="surrogatepass"))
        if size > MAX_PROMPT_BYTES:
            said = f"the prompt has {size:,} bytes, the limit is {MAX_PROMPT_BYTES:,}"
            raise RequestError(413, said, code="prompt_too_large", param="content", hint="shorten it")
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            said = "the prompt has a NUL or half a surrogate pair"
            raise RequestError(400, said, code="invalid_value", param="content", hint="send text")
        desired = self._reconciler.view.desired
        if key in desired.prompts and key not in desired.stored:
            raise _declared(key, "change its file, or store this text under another name")
        try:
            await asyncio.to_thread(self._stored.write, key, text)
        except errors.StoreError as error:
            raise RequestError(503, error.message, code="state_not_writable", hint=error.hint) from error

    async def _built(self, key: Key, *, anew: bool) -> StoredArtifact:
        """Wait for the artifact. Errors: RequestError."""
        try:
            return await (self._reconciler.regenerate(key) if anew else self._reconciler.freshen(key))
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

    def _describe(self, key: Key) -> dict[str, Any]:
        stored = key in self._reconciler.view.desired.stored
        return {"cache_name": key.prompt, "stored": stored, **prompt_status(key, self._reconciler, self._serving)}

    def _known_model(self, request: Request) -> str:
        """Also one that is in trouble: it may be well again. Errors: RequestError 404."""
        name: str = request.path_params["model"]
        if name not in self._reconciler.view.desired.models:
            self._serving.preparation.model(name)
        return name

    def _key(self, request: Request, prompt: str) -> Key:
        """Errors: RequestError for an unknown model, or a name that no prompt can have."""
        model = self._known_model(request)
        if not NAME.fullmatch(prompt):
            raise RequestError(
                400, f"{prompt!r} cannot name a prompt", code="invalid_name", param="cache_name", hint=NAME_RULE
            )
        return Key(model, prompt)


def admin_only(admin_socket: Path) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that refuses and refers to the other socket."""

    async def refused(_: Request) -> Response:
        raise RequestError(
            403, f"changes are made on {admin_socket} only", code="admin_only", hint=f"ask on {admin_socket}"
        )

    return refused


def _list(data: list[dict[str, Any]]) -> Response:
    return JSONResponse({"object": "list", "data": data})


def _no_cache(key: Key) -> RequestError:
    return RequestError(
        404, f"there is no prompt {key}", code="prompt_not_found", hint=f"GET /v1/cache/{key.model} lists what is"
    )


def _declared(key: Key, hint: str) -> RequestError:
    return RequestError(409, f"the manifest declares {key}", code="declared_in_manifest", hint=hint)
