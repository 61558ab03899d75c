"""Writes an answer, whole or as a stream: in OpenAI's shapes, chat completions and plain ones.

A writer gives the bytes of a stream, as they are sent.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import msgspec

from rkcached.api.bodies import error_body
from rkcached.api.endpoints import EVENT_STREAM
from rkcached.api.requests import ChatRequest, CompletionRequest, GenerationRequest
from rkcached.api.responses import Answer, ChatCompletion, TextCompletion
from rkcached.engines.base import FinishReason, TokenLogprob
from rkcached.errors import RequestError
from rkcached.messages.reply import Delta, Reply
from rkcached.serving.job import End, Progress, Text


class Writer(Protocol):
    """Takes one request's progress, the pieces of its answer, and its end or its error."""

    media_type: str
    """Of a stream."""

    def waiting(self) -> bytes:
        """A sign of life before the answer begins, which no client takes for a part of it."""

    def progress(self, progress: Progress) -> bytes:
        """How much is read; nothing if the client did not ask for it."""

    def piece(self, text: Text) -> bytes: ...

    def end(self, end: End) -> bytes: ...

    def error(self, error: RequestError) -> bytes:
        """The end of a stream that has begun."""

    def whole(self, texts: Iterable[Text], end: End) -> Answer: ...


class _EventWriter(ABC):
    """Writes a stream of OpenAI's: events without names, comments, and a mark at the end."""

    media_type = EVENT_STREAM

    def __init__(self, kind: str, head: dict[str, Any], request: GenerationRequest) -> None:
        """`kind`: of the chunks' objects."""
        self._head = head
        self._chunk_head = {**head, "object": kind}
        options = request.stream_options
        self._wants_usage = options is not None and options.include_usage
        self._wants_progress = bool(request.return_progress)
        self._begun_at = time.monotonic()

    @abstractmethod
    def chunks(self, text: Text) -> Iterator[dict[str, Any]]:
        """The chunks for this piece."""

    @abstractmethod
    def last(self, end: End) -> Iterator[dict[str, Any]]:
        """The chunks after the last piece; the last one has the report."""

    def waiting(self) -> bytes:
        return b": waiting\n\n"

    def progress(self, progress: Progress) -> bytes:
        if not self._wants_progress:
            return b""
        figures = {
            "total": progress.total_tokens,
            "cache": progress.cached_tokens,
            "processed": progress.read_tokens,
            "time_ms": round((time.monotonic() - self._begun_at) * 1000),
        }
        return sse({**self._chunk_head, "choices": [], "prompt_progress": figures})

    def piece(self, text: Text) -> bytes:
        return b"".join(map(sse, self.chunks(text)))

    def end(self, end: End) -> bytes:
        chunks = list(self.last(end))
        if self._wants_usage:
            chunks.append({**self._chunk_head, "choices": [], "usage": end.usage})
        return b"".join(map(sse, chunks)) + b"data: [DONE]\n\n"

    def error(self, error: RequestError) -> bytes:
        return sse(error_body(error))


class ChatWriter(_EventWriter):
    def __init__(self, request: ChatRequest, reply: Reply) -> None:
        super().__init__("chat.completion.chunk", _head("chatcmpl", request.model), request)
        self._reply = reply
        # A client that forbids parallel calls gets the first one only.
        self._one_call = request.parallel_tool_calls is False
        self._calls = 0
        self._begun = False

    def chunks(self, text: Text) -> Iterator[dict[str, Any]]:
        worded: list[dict[str, Any]] = []
        for delta in self._reply.feed(text.text):
            worded += self._delta(delta)

        logprobs = _chat_logprobs(text.logprobs)
        if logprobs is not None and not worded:
            worded = [{}]
        for words in worded:
            yield self._chunk(words, logprobs)
            logprobs = None  # once, in the first chunk

    def last(self, end: End) -> Iterator[dict[str, Any]]:
        for delta in self._reply.end():
            for worded in self._delta(delta):
                yield self._chunk(worded)

        finish = {
            "finish_reason": self._finish(end),
            "delta": {} if self._begun else {"role": "assistant"},
        }
        yield self._chunk({}) | {
            "choices": [{"index": 0, **finish, "logprobs": None}],
            "rkcached": end.report,
        }

    def whole(self, texts: Iterable[Text], end: End) -> Answer:
        chosen: list[dict[str, Any]] = []
        deltas: list[Delta] = []
        for text in texts:
            deltas += self._reply.feed(text.text)
            chosen += _chosen(text.logprobs)
        deltas += self._reply.end()

        content = ""
        reasoning = ""
        calls: list[dict[str, Any]] = []
        for delta in deltas:
            content += delta.content
            reasoning += delta.reasoning
            for worded in self._delta(delta):
                calls += worded.get("tool_calls", ())
        for call in calls:
            del call["index"]  # only chunks have it

        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not calls else None,
        }
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        choice = {
            "index": 0,
            "message": message,
            "logprobs": {"content": chosen} if chosen else None,
            "finish_reason": self._finish(end),
        }
        return ChatCompletion.model_validate(
            {**self._head, "choices": [choice], "usage": end.usage, "rkcached": end.report}
        )

    def _delta(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """As OpenAI words it; nothing for a second call where one is allowed."""
        if delta.call is not None:
            if self._one_call and self._calls:
                return
            function = {"name": delta.call.name, "arguments": delta.call.arguments}
            call = {
                "index": self._calls,
                "id": delta.call.id or f"call_{uuid.uuid4().hex}",
                "type": "function",
                "function": function,
            }
            self._calls += 1
            yield {"tool_calls": [call]}
        elif delta.reasoning:
            yield {"reasoning_content": delta.reasoning}
        else:
            yield {"content": delta.content}

    def _chunk(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        if not self._begun:
            self._begun = bool(delta)
            delta = {"role": "assistant", **delta}
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return {**self._chunk_head, "choices": [choice]}

    def _finish(self, end: End) -> str:
        return "tool_calls" if self._calls and end.finish is FinishReason.STOP else end.finish.value


class CompletionWriter(_EventWriter):
    def __init__(self, request: CompletionRequest) -> None:
        super().__init__("text_completion", _head("cmpl", request.model), request)
        self._offset = 0

    def chunks(self, text: Text) -> Iterator[dict[str, Any]]:
        yield self._chunk(text.text, self._logprobs([text]))

    def last(self, end: End) -> Iterator[dict[str, Any]]:
        yield self._chunk("", None, end.finish.value) | {"rkcached": end.report}

    def whole(self, texts: Iterable[Text], end: End) -> Answer:
        texts = list(texts)
        choice = {
            "index": 0,
            "text": "".join(text.text for text in texts),
            "logprobs": self._logprobs(texts),
            "finish_reason": end.finish.value,
        }
        return TextCompletion.model_validate(
            {**self._head, "choices": [choice], "usage": end.usage, "rkcached": end.report}
        )

    def _chunk(
        self, text: str, logprobs: dict[str, Any] | None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return {**self._chunk_head, "choices": [choice]}

    def _logprobs(self, texts: list[Text]) -> dict[str, Any] | None:
        tokens = [token for text in texts for token in text.logprobs]
        if not tokens:
            return None

        logprobs: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in tokens:
            likeliest = {other.text: other.logprob for other in token.likeliest}
            logprobs["tokens"].append(token.text)
            logprobs["token_logprobs"].append(token.logprob)
            logprobs["top_logprobs"].append(likeliest)
            logprobs["text_offset"].append(self._offset)
            self._offset += len(token.text)
        return logprobs


def sse(data: dict[str, Any]) -> bytes:
    """A server-sent event without a name."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def _head(prefix: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def _chat_logprobs(tokens: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
    return {"content": _chosen(tokens), "refusal": None} if tokens else None


def _chosen(tokens: tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
    return [
        _likely(token) | {"top_logprobs": list(map(_likely, token.likeliest))} for token in tokens
    ]


def _likely(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}
