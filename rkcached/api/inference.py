"""Answers a request of any surface: prepares it, runs it, and has a writer word the answer.

The internal request is OpenAI's, with our additions (`requests`); the internal stream is serving's.
A surface translates its own requests to the one, and has a writer for the other (`writer`). None
knows another.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response

from rkcached.api.answering import send_answer
from rkcached.api.callers import caller_of, check_model, may_change
from rkcached.api.exchange import size_of_body
from rkcached.api.prepare import Preparation
from rkcached.api.requests import ChatRequest, CompletionRequest, EmbeddingRequest, RerankRequest
from rkcached.api.streamed import unless_gone
from rkcached.api.write_chat import nul_refused
from rkcached.api.writer import Writer
from rkcached.errors import RequestError
from rkcached.messages.reply import Reply
from rkcached.serving.dispatcher import Serving
from rkcached.serving.pooling import PoolingModels

MAX_TOKENIZED_BYTES = 256 << 10
"""Nothing interrupts a tokenizer, and everybody else waits for it."""


class Inference:
    def __init__(self, preparation: Preparation, serving: Serving, pooling: PoolingModels) -> None:
        self._preparation = preparation
        self._serving = serving
        self._pooling = pooling

    async def chat(
        self,
        request: Request,
        body: ChatRequest,
        writer_for: Callable[[Reply], Writer],
        *,
        accepted: float,
        tolerant: bool = False,
    ) -> Response:
        """Answer a conversation.

        `accepted`: when the request came, in monotonic seconds. `tolerant`: sampling that the
        engine lacks is ignored, whatever the manifest says. Errors: RequestError.
        """
        check_model(request, body.model)
        preparing = self._preparation.chat(
            body,
            accepted,
            caller_of(request),
            size_of_body(request),
            is_admin=may_change(request),
            tolerant=tolerant,
        )
        prepared = await unless_gone(request, preparing)
        if isinstance(prepared, Response):
            return prepared
        job, reply = prepared
        events = self._serving.run(job)
        return await send_answer(request, events, writer_for(reply), stream=bool(body.stream))

    async def complete(
        self,
        request: Request,
        body: CompletionRequest,
        writer: Writer,
        *,
        accepted: float,
        tolerant: bool = False,
    ) -> Response:
        """Go on with a text that goes to the model as it is. Arguments and errors as for `chat`."""
        check_model(request, body.model)
        job = self._preparation.completion(
            body,
            accepted,
            caller_of(request),
            is_admin=may_change(request),
            tolerant=tolerant,
        )
        return await send_answer(request, self._serving.run(job), writer, stream=bool(body.stream))

    async def embed(
        self, request: Request, body: EmbeddingRequest
    ) -> tuple[list[bytes], int] | Response:
        """The vectors (float32, little endian) and the tokens of all texts; or the client has gone.

        Errors: RequestError.
        """
        check_model(request, body.model)
        model, inputs = self._preparation.embedding(body)
        return await unless_gone(request, self._pooling.embed(model, inputs, caller_of(request)))

    async def rank(
        self, request: Request, body: RerankRequest
    ) -> tuple[list[float], int] | Response:
        """The score of each document, and the tokens of all; or the client has gone.

        Errors: RequestError.
        """
        check_model(request, body.model)
        model, texts = self._preparation.ranking(body)
        ranking = self._pooling.rank(model, body.query, texts, caller_of(request))
        return await unless_gone(request, ranking)

    async def render(
        self, request: Request, body: ChatRequest, *, accepted: float
    ) -> str | Response:
        """A conversation as the model reads it; or the client has gone. Errors: RequestError."""
        check_model(request, body.model)
        preparing = self._preparation.chat(
            body,
            accepted,
            caller_of(request),
            size_of_body(request),
            is_admin=may_change(request),
        )
        prepared = await unless_gone(request, preparing)
        return prepared if isinstance(prepared, Response) else prepared[0].prompt

    async def tokenize(self, request: Request, model: str, text: str) -> Sequence[int] | Response:
        """The tokens of a text; or the client has gone. Errors: RequestError."""
        check_model(request, model)
        if len(text.encode()) > MAX_TOKENIZED_BYTES:
            raise RequestError(
                400,
                f"content is larger than {MAX_TOKENIZED_BYTES:,} bytes",
                code="invalid_value",
                param="content",
                hint="send it in parts",
            )
        if "\0" in text:
            raise nul_refused("content")
        asking = self._serving.tokenize(model, text, caller_of(request))
        return await unless_gone(request, asking)

    async def load(self, request: Request, model: str) -> None:
        """Load a model now. Errors: RequestError."""
        check_model(request, model)
        await self._serving.load(model)


def floats_of(vector: bytes) -> list[float]:
    """The numbers of a vector for JSON.

    numpy would be no quicker here, and take 20 MB of the daemon's memory for good.
    """
    return [value for (value,) in struct.iter_unpack("<f", vector)]
