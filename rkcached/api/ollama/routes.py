"""Ollama's API: for programs that speak it, such as Home Assistant and Open WebUI."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rkcached import __version__
from rkcached.api.callers import check_model, may_use, viewer_of
from rkcached.api.endpoints import endpoint
from rkcached.api.exchange import answer, read_record
from rkcached.api.inference import Inference, floats_of
from rkcached.api.ollama.requests import (
    OllamaChatRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaModelRequest,
    known_name,
)
from rkcached.api.ollama.writer import (
    NDJSON,
    OLLAMA,
    OllamaAnswer,
    OllamaDetails,
    OllamaLoadedModel,
    OllamaLoadedModels,
    OllamaModel,
    OllamaModels,
    OllamaShown,
    OllamaVector,
    OllamaVectors,
    OllamaVersion,
    OllamaWriter,
    moment,
    now,
    ns,
)
from rkcached.api.requests import CompletionRequest
from rkcached.errors import RequestError
from rkcached.messages.reply import Reply
from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.snapshot import Published, Snapshot
from rkcached.serving.models import find_model
from rkcached.worker.pool import Workers

API_VERSION = "0.12.6"
"""Of the API that is answered here. Programs ask for it and compare it with what they need."""

_FAILURES = (404, 409, 422, 502, 503, 504)

_NO_MESSAGE = {"role": "assistant", "content": ""}

_FAR = "2318-01-01T00:00:00Z"  # a model stays for as long as the manifest says


def _refused(method: str, action: str) -> Callable[..., Awaitable[Response]]:
    """One of Ollama's endpoints that change what models there are."""

    async def refused(_api: object, _request: Request) -> Response:
        raise RequestError(
            403,
            f"rkcached does not support {action}: models are declared in the manifest",
            code="from_the_manifest",
            hint="put the model's file on this machine and declare it under `models:`; the daemon "
            "serves it after you save the manifest",
        )

    refused.__name__ = f"_ollama_{action}"
    declared = endpoint(
        method,
        f"/api/{action}",
        summary="Ollama: not supported, as models are declared in the manifest.",
        answers={200: None},
        errors=(403,),
        surface=OLLAMA,
    )
    return declared(refused)


class OllamaApi:
    def __init__(self, inference: Inference, published: Published, workers: Workers) -> None:
        self._inference = inference
        self._published = published
        self._workers = workers

    # Inference

    @endpoint(
        "POST",
        "/api/chat",
        summary="Ollama: answer a conversation.",
        body=OllamaChatRequest,
        answers={200: OllamaAnswer},
        media=(NDJSON,),
        errors=_FAILURES,
        surface=OLLAMA,
    )
    async def _ollama_chat(self, request: Request) -> Response:
        accepted = time.monotonic()
        body = await read_record(OllamaChatRequest, request)
        model = self._name(request, body.model)
        if not body.messages:
            return await self._load(request, body.model, model, {"message": _NO_MESSAGE})

        def writer_for(reply: Reply) -> OllamaWriter:
            return OllamaWriter(body.model, reply, is_chat=True)

        internal = await asyncio.to_thread(body.internal, model)
        return await self._inference.chat(
            request, internal, writer_for, accepted=accepted, tolerant=True
        )

    @endpoint(
        "POST",
        "/api/generate",
        summary="Ollama: answer one question, or go on with a text (`raw`).",
        body=OllamaGenerateRequest,
        answers={200: OllamaAnswer},
        media=(NDJSON,),
        errors=_FAILURES,
        surface=OLLAMA,
    )
    async def _ollama_generate(self, request: Request) -> Response:
        accepted = time.monotonic()
        body = await read_record(OllamaGenerateRequest, request)
        model = self._name(request, body.model)
        if not body.prompt:
            return await self._load(request, body.model, model, {"response": ""})

        def writer_for(reply: Reply | None) -> OllamaWriter:
            return OllamaWriter(body.model, reply, is_chat=False)

        internal = body.internal(model)
        if isinstance(internal, CompletionRequest):
            return await self._inference.complete(
                request, internal, writer_for(None), accepted=accepted, tolerant=True
            )
        return await self._inference.chat(
            request, internal, writer_for, accepted=accepted, tolerant=True
        )

    async def _load(
        self, request: Request, shown: str, model: str, words: dict[str, Any]
    ) -> Response:
        """The answer to a request without words: the model is loaded."""
        started = time.monotonic()
        await self._inference.load(request, model.partition("/")[0])
        took = ns(time.monotonic() - started)
        return answer(
            OllamaAnswer(
                model=shown,
                created_at=now(),
                done=True,
                done_reason="load",
                total_duration=took,
                load_duration=took,
                **words,
            )
        )

    @endpoint(
        "POST",
        "/api/embed",
        summary="Ollama: make vectors of texts.",
        body=OllamaEmbedRequest,
        answers={200: OllamaVectors},
        errors=_FAILURES,
        surface=OLLAMA,
    )
    async def _ollama_embed(self, request: Request) -> Response:
        started = time.monotonic()
        body = await read_record(OllamaEmbedRequest, request)
        result = await self._inference.embed(
            request, body.internal(self._name(request, body.model))
        )
        if isinstance(result, Response):
            return result
        vectors, tokens = result
        return answer(
            OllamaVectors(
                model=body.model,
                embeddings=[floats_of(vector) for vector in vectors],
                total_duration=ns(time.monotonic() - started),
                prompt_eval_count=tokens,
            )
        )

    @endpoint(
        "POST",
        "/api/embeddings",
        summary="Ollama: make a vector of one text.",
        body=OllamaEmbedRequest,
        answers={200: OllamaVector},
        errors=_FAILURES,
        surface=OLLAMA,
    )
    async def _ollama_embeddings(self, request: Request) -> Response:
        body = await read_record(OllamaEmbedRequest, request)
        result = await self._inference.embed(
            request, body.internal(self._name(request, body.model))
        )
        if isinstance(result, Response):
            return result
        return answer(OllamaVector(embedding=floats_of(result[0][0])))

    # Models

    @endpoint(
        "GET",
        "/api/tags",
        summary="Ollama: models, and their prompts as `model/prompt`.",
        answers={200: OllamaModels},
        surface=OLLAMA,
    )
    async def _ollama_tags(self, request: Request) -> Response:
        snapshot = self._seen(request)
        usable = {
            name: model
            for name, model in snapshot.desired.models.items()
            if isinstance(model, DesiredModel) and may_use(request, name)
        }
        names = list(usable.items())
        names += [
            (str(key), usable[key.model]) for key in snapshot.desired.texts if key.model in usable
        ]
        files = await asyncio.to_thread(_files_of, usable.values())
        listed = [
            OllamaModel(
                name=f"{name}:latest",
                model=f"{name}:latest",
                modified_at=moment(files[model.name][1]),
                size=files[model.name][0],
                digest=model.identity,
                details=self._details(model),
            )
            for name, model in names
        ]
        return answer(OllamaModels(models=listed))

    @endpoint(
        "GET",
        "/api/ps",
        summary="Ollama: the models that are loaded.",
        answers={200: OllamaLoadedModels},
        surface=OLLAMA,
    )
    async def _ollama_loaded(self, request: Request) -> Response:
        models = self._seen(request).desired.models
        loaded = [
            (model, worker.info.context_tokens)
            for worker in self._workers.all()
            if worker.info is not None
            and may_use(request, worker.model.name)
            and isinstance(model := models.get(worker.model.name), DesiredModel)
        ]
        files = await asyncio.to_thread(_files_of, [model for model, _ in loaded])
        listed = [
            OllamaLoadedModel(
                name=f"{model.name}:latest",
                model=f"{model.name}:latest",
                size=files[model.name][0],
                digest=model.identity,
                details=self._details(model),
                expires_at=_FAR,
                context_length=context_tokens,
            )
            for model, context_tokens in loaded
        ]
        return answer(OllamaLoadedModels(models=listed))

    @endpoint(
        "POST",
        "/api/show",
        summary="Ollama: the facts of a model.",
        body=OllamaModelRequest,
        answers={200: OllamaShown},
        errors=(404, 503),
        surface=OLLAMA,
    )
    async def _ollama_show(self, request: Request) -> Response:
        body = await read_record(OllamaModelRequest, request)
        name = self._name(request, body.model or body.name or "")
        check_model(request, name)
        model = find_model(self._seen(request), name.partition("/")[0])
        files = await asyncio.to_thread(_files_of, [model])
        details = self._details(model)
        context_tokens = model.config.params.max_context_len or model.source.trained_tokens or 0
        return answer(
            OllamaShown(
                modified_at=moment(files[model.name][1]),
                details=details,
                model_info={
                    "general.architecture": details.family,
                    f"{details.family}.context_length": context_tokens,
                },
                capabilities=await asyncio.to_thread(_capabilities, model),
            )
        )

    @endpoint(
        "GET",
        "/api/version",
        summary="Ollama: the version of its API that is answered.",
        answers={200: OllamaVersion},
        surface=OLLAMA,
    )
    async def _ollama_version(self, _: Request) -> Response:
        return answer(OllamaVersion(version=API_VERSION, rkcached=__version__))

    _pull = _refused("POST", "pull")
    _push = _refused("POST", "push")
    _create = _refused("POST", "create")
    _copy = _refused("POST", "copy")
    _delete = _refused("DELETE", "delete")

    def _seen(self, request: Request) -> Snapshot:
        return self._published.now.seen_by(viewer_of(request))

    def _name(self, request: Request, name: str) -> str:
        desired = self._seen(request).desired
        return known_name(name, {*desired.models, *map(str, desired.prompts)})

    def _details(self, model: DesiredModel) -> OllamaDetails:
        kind = self._published.now.manifest.engine.kind.value
        form = "gguf" if model.config.path.suffix == ".gguf" else kind
        return OllamaDetails(format=form, family=kind, families=[kind])


def _files_of(models: Iterable[DesiredModel]) -> dict[str, tuple[int, float]]:
    """By model: the bytes of its files, and when the newest was changed. Blocking."""
    found = {}
    for model in models:
        infos = []
        for path, _ in model.source.signatures:
            try:
                infos.append(Path(path).stat())
            except OSError:
                continue
        size_bytes = sum(info.st_size for info in infos)
        found[model.name] = size_bytes, max((info.st_mtime for info in infos), default=0.0)
    return found


def _capabilities(model: DesiredModel) -> list[str]:
    """Blocking: a template may have to be tried."""
    if model.config.pools:
        return ["embedding"] if model.config.embedding else []
    capabilities = ["completion"]
    if model.template.answer.calls is not None:
        capabilities.append("tools")
    if model.config.thinks:
        capabilities.append("thinking")
    return capabilities
