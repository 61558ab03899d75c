"""HTTP routes of prompt caches and of loaded models: the operations beside inference.

The text of a stored prompt is a file, a source like any other; the reconciler does the rest, and
the call waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rkcached import errors
from rkcached.api.callers import viewer_of
from rkcached.api.endpoints import EVENT_STREAM, endpoint
from rkcached.api.exchange import answer, read_record
from rkcached.api.requests import CollectRequest, GenerateBinaryRequest, ModelRequest, StoreRequest
from rkcached.api.responses import (
    BinaryCacheCreated,
    CacheAccepted,
    CacheCreated,
    CacheDeleted,
    CacheEntry,
    CacheList,
    Collected,
    ModelAction,
    ModelStatusList,
)
from rkcached.api.status import model_status, prompt_status
from rkcached.api.streamed import Streamed, unless_gone
from rkcached.errors import RequestError
from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.loop import Reconciler
from rkcached.reconcile.snapshot import Snapshot
from rkcached.serving.dispatcher import Serving
from rkcached.serving.learning import Learning
from rkcached.serving.models import find_model, writes_nothing
from rkcached.sources.manifest import RESERVED_PROMPT
from rkcached.sources.problems import NAME, NAME_RULE
from rkcached.sources.records import Key
from rkcached.sources.stored_texts import StoredTexts
from rkcached.sources.text_files import MAX_PROMPT_BYTES
from rkcached.store.garbage import as_data
from rkcached.store.sidecar import StoredArtifact
from rkcached.worker.pool import Workers

LENT_HEARTBEAT_S = 15.0
"""A client that went away without closing its connection is noticed after this at the latest."""


class CacheApi:
    def __init__(
        self,
        reconciler: Reconciler,
        serving: Serving,
        workers: Workers,
        stored: StoredTexts,
        learning: Learning,
    ) -> None:
        self._reconciler = reconciler
        self._serving = serving
        self._workers = workers
        self._stored = stored
        self._learning = learning

    # Models

    @endpoint(
        "GET",
        "/v1/models/available",
        summary="Every model, and its worker.",
        answers={200: ModelStatusList},
    )
    async def _available(self, _: Request) -> Response:
        return answer(ModelStatusList.model_validate({"data": self._model_states()}))

    @endpoint(
        "GET",
        "/v1/models/loaded",
        summary="Those that are loaded.",
        answers={200: ModelStatusList},
    )
    async def _loaded(self, _: Request) -> Response:
        loaded = [state for state in self._model_states() if state["pid"] is not None]
        return answer(ModelStatusList.model_validate({"data": loaded}))

    @endpoint(
        "POST",
        "/v1/models/load",
        summary="Load a model now.",
        body=ModelRequest,
        answers={200: ModelAction},
        errors=(404, 502, 503, 504),
        admin=True,
    )
    async def _load(self, request: Request) -> Response:
        body = await read_record(ModelRequest, request)
        started = time.monotonic()
        await self._serving.load(body.model)
        return self._model_answer("model.loaded", body.model, started)

    @endpoint(
        "POST",
        "/v1/models/unload",
        summary="Unload a model. It is loaded again when it is needed.",
        body=ModelRequest,
        answers={200: ModelAction},
        errors=(404, 503),
        admin=True,
    )
    async def _unload(self, request: Request) -> Response:
        body = await read_record(ModelRequest, request)
        started = time.monotonic()
        await self._serving.unload(body.model)
        return self._model_answer("model.unloaded", body.model, started)

    @endpoint(
        "POST",
        "/v1/models/lend",
        summary="Unload a model, and hold its turn on the engine "
        "until the client closes the connection.",
        body=ModelRequest,
        answers={200: None},
        media=(EVENT_STREAM,),
        errors=(404, 503),
        admin=True,
    )
    async def _lend(self, request: Request) -> Response:
        body = await read_record(ModelRequest, request)
        lending = self._lending(body.model)
        # The first event comes when it is the client's turn. Until then an error can be a status.
        first = await unless_gone(request, anext(lending))
        if isinstance(first, Response):
            await lending.aclose()
            return first
        return Streamed(_with_first(first, lending), media_type=EVENT_STREAM)

    async def _lending(self, name: str) -> AsyncGenerator[bytes, None]:
        async with self._serving.lend(name):
            yield b"event: lent\ndata: {}\n\n"
            while True:
                await asyncio.sleep(LENT_HEARTBEAT_S)
                yield b": still lent\n\n"

    def _model_answer(self, kind: str, name: str, started: float) -> Response:
        model = find_model(self._reconciler.snapshot, name)
        took_ms = round((time.monotonic() - started) * 1000, 1)
        state = model_status(name, model, self._workers)
        document = {"object": kind, "model": name, "took_ms": took_ms, **state}
        return answer(ModelAction.model_validate(document))

    def _model_states(self) -> list[dict[str, Any]]:
        models = self._reconciler.snapshot.desired.models
        return [model_status(name, model, self._workers) for name, model in models.items()]

    # Caches

    @endpoint(
        "GET",
        "/v1/cache/{model}",
        summary="The prompts of a model and their caches.",
        answers={200: CacheList},
        errors=(404, 503),
    )
    async def _list(self, request: Request) -> Response:
        model = self._known_model(request)
        snapshot = self._reconciler.snapshot.seen_by(viewer_of(request))
        entries = [
            self._describe(key, snapshot) for key in snapshot.assessments if key.model == model
        ]
        return answer(CacheList.model_validate({"data": entries}))

    @endpoint(
        "GET",
        "/v1/cache/{model}/{name}",
        summary="One prompt and its cache.",
        answers={200: CacheEntry},
        errors=(400, 404, 503),
    )
    async def _get(self, request: Request) -> Response:
        key = self._key(request, request.path_params["name"])
        snapshot = self._reconciler.snapshot.seen_by(viewer_of(request))
        if key not in snapshot.assessments:
            raise _no_cache(key)
        return answer(CacheEntry.model_validate(self._describe(key, snapshot)))

    @endpoint(
        "POST",
        "/v1/cache/{model}",
        summary="Store a text, and build its prompt cache.",
        body=StoreRequest,
        answers={200: CacheCreated, 202: CacheAccepted},
        errors=(404, 409, 503),
        admin=True,
    )
    async def _store(self, request: Request) -> Response:
        body = await read_record(StoreRequest, request)
        key = self._key(request, body.cache_name)
        await self._write(key, body.content, "content")

        if not body.wait:
            await self._reconciler.next_look()  # after that, the location exists
            location = f"/v1/cache/{key.model}/{key.prompt}"
            accepted = CacheAccepted(model=key.model, cache_name=key.prompt, location=location)
            return answer(accepted, status=202, headers={"Location": location})

        await self._built(key, anew=False)
        return answer(CacheCreated.model_validate(self._describe(key, self._reconciler.snapshot)))

    @endpoint(
        "POST",
        "/v1/cache/{model}/generate-binary",
        summary="Build a prompt cache anew, of its text or of a new one.",
        body=GenerateBinaryRequest,
        answers={200: BinaryCacheCreated},
        errors=(404, 409, 503),
        admin=True,
    )
    async def _generate_binary(self, request: Request) -> Response:
        body = await read_record(GenerateBinaryRequest, request)
        key = self._key(request, body.cache_name)
        if body.prompt is not None:
            await self._write(key, body.prompt, "prompt")
        artifact = await self._built(key, anew=body.prompt is None)

        sidecar = artifact.sidecar
        size_mb = sidecar.size_bytes / 1_000_000
        return answer(
            BinaryCacheCreated(
                model=key.model,
                cache_name=key.prompt,
                size_mb=round(size_mb, 2),
                ttft_ms=round(sidecar.figures.warm_ttft_ms, 1),
                timestamp=int(sidecar.built_at),
                message=f"Binary cache generated successfully ({size_mb:.2f} MB)",
                tokens=sidecar.tokens,
                prefill_ms=round(sidecar.figures.prefill_ms, 1),
                cold_ttft_ms=round(sidecar.figures.cold_ttft_ms, 1),
                build_ms=round(sidecar.build_ms, 1),
                size_bytes=sidecar.size_bytes,
            )
        )

    @endpoint(
        "DELETE",
        "/v1/cache/{model}/{name}",
        summary="Delete a stored or learned prompt and its cache.",
        answers={200: CacheDeleted},
        errors=(400, 404, 409, 503),
        admin=True,
    )
    async def _delete(self, request: Request) -> Response:
        key = self._key(request, request.path_params["name"])
        desired = self._reconciler.snapshot.desired
        if key in desired.prompts and key not in desired.stored:
            raise _declared(key, "remove it there")

        with _refusing_as("state_not_writable"):
            if key in desired.learned:
                deleted = await self._learning.forget(key)
            else:
                deleted = await asyncio.to_thread(self._stored.delete, key)
        if not deleted:
            raise _no_cache(key)

        with _refusing_as("store_not_writable"):
            await self._reconciler.forget(key)
        return answer(CacheDeleted(model=key.model, cache_name=key.prompt))

    @endpoint(
        "POST",
        "/v1/gc",
        summary="Remove artifacts that no prompt uses, and the quarantine; "
        "list what is not the store's.",
        body=CollectRequest,
        answers={200: Collected},
        errors=(503,),
        admin=True,
    )
    async def _collect(self, request: Request) -> Response:
        body = await read_record(CollectRequest, request)
        with _refusing_as("store_not_writable"):
            rubbish = await self._reconciler.collect(dry_run=body.dry_run, strangers=body.strangers)

        data = as_data(rubbish)
        total = sum(item["size_bytes"] for item in data["items"])
        document = {"removed": not body.dry_run, "size_bytes": total, **data}
        return answer(Collected.model_validate(document))

    async def _write(self, key: Key, text: str, param: str) -> None:
        """Store a client's text. Errors: RequestError."""
        model = self._reconciler.snapshot.desired.models.get(key.model)
        if isinstance(model, DesiredModel) and model.config.pools:
            raise writes_nothing(model)
        _check_text(text, param)

        desired = self._reconciler.snapshot.desired
        if key in desired.learned:
            raise RequestError(
                409,
                f"{key} was learned from requests",
                code="prompt_exists",
                param="cache_name",
                hint="store this text under another name",
            )
        if key in desired.prompts and key not in desired.stored:
            raise _declared(key, "change its file, or store this text under another name")
        with _refusing_as("state_not_writable"):
            await asyncio.to_thread(self._stored.write, key, text)

    async def _built(self, key: Key, *, anew: bool) -> StoredArtifact:
        """Wait for the artifact. Errors: RequestError."""
        build = self._reconciler.regenerate if anew else self._reconciler.freshen
        try:
            return await build(key)
        except errors.SourceError as error:
            known = key in self._reconciler.snapshot.desired.prompts
            status, code = (409, "prompt_blocked") if known else (404, "prompt_not_found")
            raise RequestError(status, error.message, code=code, hint=error.hint) from error
        except (
            errors.ContextExceeded,
            errors.PromptTooShort,
            errors.Uncacheable,
            errors.BudgetExceeded,
        ) as error:
            raise RequestError(
                409, error.message, code="prompt_blocked", hint=error.hint
            ) from error
        except errors.RkcachedError as error:
            raise RequestError(503, error.message, code="build_failed", hint=error.hint) from error

    def _describe(self, key: Key, snapshot: Snapshot) -> dict[str, Any]:
        return {
            "cache_name": key.prompt,
            "stored": key in snapshot.desired.stored,
            **prompt_status(key, snapshot, self._serving),
        }

    def _known_model(self, request: Request) -> str:
        """The name in the path, also of a model in trouble. Errors: RequestError 404."""
        name: str = request.path_params["model"]
        if name not in self._reconciler.snapshot.desired.models:
            find_model(self._reconciler.snapshot, name)
        return name

    def _key(self, request: Request, prompt: str) -> Key:
        """Errors: RequestError for an unknown model, or a name that no prompt can have."""
        model = self._known_model(request)
        if not NAME.fullmatch(prompt) or prompt == RESERVED_PROMPT:
            raise RequestError(
                400,
                f"{prompt!r} cannot name a prompt",
                code="invalid_name",
                param="cache_name",
                hint=NAME_RULE,
            )
        return Key(model, prompt)


async def _with_first(
    first: bytes, rest: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    """Both in one stream. If the client goes away, this closes `rest`."""
    async with contextlib.aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk


def _check_text(text: str, param: str) -> None:
    """Errors: RequestError for a text that cannot be a prompt."""
    if not text.strip():
        raise RequestError(
            400, "the prompt is empty", code="empty_prompt", param=param, hint="send its text"
        )

    size_bytes = len(text.encode(errors="surrogatepass"))
    if size_bytes > MAX_PROMPT_BYTES:
        raise RequestError(
            413,
            f"the prompt has {size_bytes:,} bytes, the limit is {MAX_PROMPT_BYTES:,}",
            code="prompt_too_large",
            param=param,
            hint="shorten it",
        )

    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RequestError(
            400,
            "the prompt has a NUL or half a surrogate pair",
            code="invalid_value",
            param=param,
            hint="send text",
        )


@contextlib.contextmanager
def _refusing_as(code: str) -> Iterator[None]:
    """Answer a StoreError of the body with 503 and this code."""
    try:
        yield
    except errors.StoreError as error:
        raise RequestError(503, error.message, code=code, hint=error.hint) from error


def _no_cache(key: Key) -> RequestError:
    return RequestError(
        404,
        f"there is no prompt {key}",
        code="prompt_not_found",
        hint=f"GET /v1/cache/{key.model} lists what is",
    )


def _declared(key: Key, hint: str) -> RequestError:
    return RequestError(409, f"the manifest declares {key}", code="declared_in_manifest", hint=hint)
