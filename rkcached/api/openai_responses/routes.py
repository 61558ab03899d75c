"""OpenAI's Responses, as an interface to the same answers. It keeps nothing."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from rkcached.api.endpoints import EVENT_STREAM, Surface, endpoint
from rkcached.api.exchange import read_translated
from rkcached.api.inference import Inference
from rkcached.api.openai_responses.requests import ResponsesRequest
from rkcached.api.openai_responses.writer import (
    ResponseAnswer,
    ResponsesWriter,
    responses_error,
)
from rkcached.api.requests import ChatRequest
from rkcached.api.responses import ErrorAnswer
from rkcached.api.writer import Writer
from rkcached.errors import RequestError
from rkcached.messages.reply import Reply

RESPONSES = Surface(error_record=ErrorAnswer, error_body=responses_error)

_KEPT = "/v1/responses/{response_id:path}"


class ResponsesApi:
    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    @endpoint(
        "POST",
        "/v1/responses",
        summary="Answer a conversation of items.",
        body=ResponsesRequest,
        answers={200: ResponseAnswer},
        media=(EVENT_STREAM,),
        errors=(404, 409, 422, 502, 503, 504),
        surface=RESPONSES,
    )
    async def _responses(self, request: Request) -> Response:
        accepted = time.monotonic()
        body, chat = await read_translated(ResponsesRequest, request, _translated)

        def writer_for(reply: Reply) -> Writer:
            return ResponsesWriter(body, reply)

        return await self._inference.chat(request, chat, writer_for, accepted=accepted)

    @endpoint("GET", _KEPT, summary="Refused: no response is kept.", answers={}, errors=(404,))
    async def _get_response(self, _: Request) -> Response:
        raise _not_kept()

    @endpoint("POST", _KEPT, summary="Refused: no response is kept.", answers={}, errors=(404,))
    async def _post_response(self, _: Request) -> Response:
        raise _not_kept()

    @endpoint("DELETE", _KEPT, summary="Refused: no response is kept.", answers={}, errors=(404,))
    async def _delete_response(self, _: Request) -> Response:
        raise _not_kept()


def _translated(body: ResponsesRequest) -> tuple[ResponsesRequest, ChatRequest]:
    return body, body.translated()


def _not_kept() -> RequestError:
    return RequestError(
        404,
        "rkcached keeps no responses",
        code="response_not_found",
        hint="POST /v1/responses with all items of the conversation in input",
    )
