"""Anthropic's Messages, as an interface to the same answers."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from rkcached.api.anthropic.requests import MessagesRequest
from rkcached.api.anthropic.writer import (
    AnthropicError,
    MessageAnswer,
    MessagesWriter,
    anthropic_error,
)
from rkcached.api.endpoints import EVENT_STREAM, Surface, endpoint
from rkcached.api.exchange import read_translated
from rkcached.api.inference import Inference
from rkcached.api.requests import ChatRequest
from rkcached.api.writer import Writer
from rkcached.errors import RequestError
from rkcached.messages.reply import Reply

ANTHROPIC = Surface(error_record=AnthropicError, error_body=anthropic_error)


class AnthropicApi:
    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    @endpoint(
        "POST",
        "/v1/messages",
        summary="Answer a conversation of Anthropic's form.",
        body=MessagesRequest,
        answers={200: MessageAnswer},
        media=(EVENT_STREAM,),
        errors=(404, 409, 422, 502, 503, 504),
        surface=ANTHROPIC,
    )
    async def _messages(self, request: Request) -> Response:
        accepted = time.monotonic()
        chat, one_call = await read_translated(MessagesRequest, request, _translated)

        def writer_for(reply: Reply) -> Writer:
            return MessagesWriter(chat.model, reply, one_call=one_call)

        return await self._inference.chat(request, chat, writer_for, accepted=accepted)

    @endpoint(
        "POST",
        "/v1/messages/count_tokens",
        summary="Not supported.",
        answers={},
        errors=(404,),
        surface=ANTHROPIC,
    )
    async def _count_tokens(self, _: Request) -> Response:
        raise RequestError(
            404,
            "rkcached does not support count_tokens",
            code="unknown_url",
            hint="read usage in the answer of POST /v1/messages, or use POST /tokenize",
        )


def _translated(body: MessagesRequest) -> tuple[ChatRequest, bool]:
    return body.translated(), body.one_call
