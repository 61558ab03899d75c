"""Endpoints of llama.cpp's server that programs use beside OpenAI's: what a request becomes.

Its server has one model, so a request need not name one; here it must where there are several.
"""

from __future__ import annotations

import time

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from rkcached import __version__
from rkcached.api.callers import check_model, may_use, viewer_of
from rkcached.api.endpoints import endpoint
from rkcached.api.exchange import answer, read_record
from rkcached.api.inference import Inference
from rkcached.api.requests import ChatRequest
from rkcached.api.responses import Answer
from rkcached.errors import RequestError
from rkcached.messages.record import Name, Record
from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.snapshot import Published
from rkcached.serving.models import find_text_model

_FAILURES = (404, 502, 503, 504)


class TokenizeRequest(Record):
    """`POST /tokenize`."""

    content: str
    model: Name | None = None
    add_special: bool | None = Field(
        default=None, description="A token that begins every text of the model is always shown."
    )
    parse_special: bool | None = Field(default=None, description="Control tokens are always read.")


class Tokens(Answer):
    tokens: list[int]


class RenderedPrompt(Answer):
    prompt: str


class GenerationSettings(Answer):
    n_ctx: int


class Props(Answer):
    default_generation_settings: GenerationSettings
    total_slots: int
    model_alias: str
    model_path: str
    build_info: str


class LlamaServerApi:
    def __init__(self, inference: Inference, published: Published) -> None:
        self._inference = inference
        self._published = published

    @endpoint(
        "POST",
        "/tokenize",
        summary="The tokens of a text, as the model reads it.",
        body=TokenizeRequest,
        answers={200: Tokens},
        errors=_FAILURES,
    )
    async def _tokenize(self, request: Request) -> Response:
        body = await read_record(TokenizeRequest, request)
        name = self._one_model(request, body.model).name
        tokens = await self._inference.tokenize(request, name, body.content)
        return tokens if isinstance(tokens, Response) else answer(Tokens(tokens=list(tokens)))

    @endpoint(
        "POST",
        "/apply-template",
        summary="A conversation as the model reads it.",
        body=ChatRequest,
        answers={200: RenderedPrompt},
        errors=(404, 409, 422, 503),
    )
    async def _apply_template(self, request: Request) -> Response:
        body = await read_record(ChatRequest, request)
        prompt = await self._inference.render(request, body, accepted=time.monotonic())
        return prompt if isinstance(prompt, Response) else answer(RenderedPrompt(prompt=prompt))

    @endpoint(
        "GET",
        "/props",
        summary="The model's context, and its file. `?model=` names one of several.",
        answers={200: Props},
        errors=(400, 404, 503),
    )
    async def _props(self, request: Request) -> Response:
        model = self._one_model(request, request.query_params.get("model"))
        context_tokens = model.config.params.max_context_len or model.source.trained_tokens or 0
        return answer(
            Props(
                default_generation_settings=GenerationSettings(n_ctx=context_tokens),
                total_slots=1,
                model_alias=model.name,
                model_path=model.config.path.name,
                build_info=f"rkcached {__version__}",
            )
        )

    def _one_model(self, request: Request, name: str | None) -> DesiredModel:
        """The model of this name; without one, the only model that writes text."""
        snapshot = self._published.now.seen_by(viewer_of(request))
        if name:
            check_model(request, name)
            return find_text_model(snapshot, name.partition("/")[0])

        writers = [
            model
            for model in snapshot.desired.models.values()
            if isinstance(model, DesiredModel)
            and not model.config.pools
            and may_use(request, model.name)
        ]
        if len(writers) != 1:
            known = ", ".join(model.name for model in writers) or "none"
            raise RequestError(
                400,
                f"the request names no model; models that it could use: {known}",
                code="missing_parameter",
                param="model",
                hint="name one as `model`",
            )
        return writers[0]
