"""Anthropic's answers and errors: their records, and the writer that makes them. Pure.

A stream's first event has the counts of the request's tokens, which the engine's progress tells
before the answer begins; with an engine that does not, they are 0 there. The last but one event
repeats all counts as they were measured at the end.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec
from pydantic import Field

from rkcached.api.blocks import Block, BlockKind, Blocks, Step, Steps
from rkcached.api.bodies import in_words_of
from rkcached.api.responses import Answer
from rkcached.engines.base import FinishReason
from rkcached.errors import RequestError
from rkcached.messages.reply import Reply
from rkcached.serving.job import End, Progress, Text
from rkcached.serving.report import CacheReport, Usage

_ERROR_TYPES = {
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}

_NAMES = {"response_format": "output_config.format"}
"""Of parameters that the translation renames."""

_IDS = {BlockKind.TEXT: "", BlockKind.REASONING: "", BlockKind.CALL: "toolu_"}


class AnthropicErrorDetail(Answer):
    type: str
    message: str


class AnthropicError(Answer):
    """Anthropic's error envelope."""

    type: Literal["error"] = "error"
    error: AnthropicErrorDetail


class AnswerText(Answer):
    type: Literal["text"] = "text"
    text: str


class AnswerThinking(Answer):
    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = Field(default="", description="Always empty: nothing checks it.")


class AnswerToolUse(Answer):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Answer):
    input_tokens: int = Field(description="Without those that came from a cache.")
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0
    output_tokens: int


class MessageAnswer(Answer):
    """The answer of `POST /v1/messages`."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerText | AnswerThinking | AnswerToolUse]
    stop_reason: Literal["end_turn", "max_tokens", "tool_use"]
    stop_sequence: None = None
    usage: MessageUsage
    rkcached: CacheReport


def anthropic_error(error: RequestError) -> dict[str, Any]:
    """Anthropic's error envelope."""
    error = in_words_of(error, _NAMES)
    default = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ERROR_TYPES.get(error.status, default)
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    return {"type": "error", "error": {"type": kind, "message": message}}


class MessagesWriter:
    media_type = "text/event-stream"

    def __init__(self, model: str, reply: Reply, *, one_call: bool) -> None:
        self._head = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._blocks = Blocks(reply, _IDS, one_call=one_call)
        self._is_begun = False
        self._usage = _usage(0, 0, 0)

    def waiting(self) -> bytes:
        return _event({"type": "ping"})

    def progress(self, progress: Progress) -> bytes:
        self._usage = _usage(progress.total_tokens, progress.cached_tokens, 0)
        return b""

    def piece(self, text: Text) -> bytes:
        return b"".join(self._events(self._blocks.feed(text.text)))

    def end(self, end: End) -> bytes:
        events = list(self._events(self._blocks.end()))
        if not self._is_begun:  # an answer without a letter
            events.append(self._start())

        delta = {"stop_reason": self._stop_reason(end), "stop_sequence": None}
        last = {"type": "message_delta", "delta": delta, "usage": _final(end.usage)}
        events.append(_event(last | {"rkcached": end.report}))
        events.append(_event({"type": "message_stop"}))
        return b"".join(events)

    def error(self, error: RequestError) -> bytes:
        return _event(anthropic_error(error))

    def whole(self, texts: Iterable[Text], end: End) -> MessageAnswer:
        for text in texts:
            for _ in self._blocks.feed(text.text):
                pass
        for _ in self._blocks.end():
            pass

        content = list(map(_whole_block, self._blocks.done))
        return MessageAnswer.model_validate(
            {
                **self._head,
                "content": content,
                "stop_reason": self._stop_reason(end),
                "usage": _final(end.usage),
                "rkcached": end.report,
            }
        )

    def _events(self, steps: Steps) -> Iterator[bytes]:
        for step, block, text in steps:
            if not self._is_begun:
                yield self._start()

            match step:
                case Step.BEGIN:
                    fields = {"type": "content_block_start", "content_block": _empty_block(block)}
                case Step.PIECE:
                    fields = {"type": "content_block_delta", "delta": _delta(block, text)}
                case Step.END:
                    fields = {"type": "content_block_stop"}
            yield _event({**fields, "index": block.index})

    def _start(self) -> bytes:
        self._is_begun = True
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = {**self._head, **empty, "usage": self._usage}
        return _event({"type": "message_start", "message": message})

    def _stop_reason(self, end: End) -> str:
        if end.finish is not FinishReason.STOP:
            return "max_tokens"
        return "tool_use" if self._blocks.has_calls else "end_turn"


def _event(fields: dict[str, Any]) -> bytes:
    """A server-sent event with the name of its type, which Anthropic's clients go by."""
    return b"event: %b\ndata: %b\n\n" % (fields["type"].encode(), msgspec.json.encode(fields))


def _empty_block(block: Block) -> dict[str, Any]:
    if block.call is not None:
        return {"type": "tool_use", "id": _call_id(block), "name": block.call.name, "input": {}}
    if block.kind is BlockKind.REASONING:
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _delta(block: Block, text: str) -> dict[str, Any]:
    match block.kind:
        case BlockKind.CALL:
            return {"type": "input_json_delta", "partial_json": text}
        case BlockKind.REASONING:
            return {"type": "thinking_delta", "thinking": text}
        case BlockKind.TEXT:
            return {"type": "text_delta", "text": text}


def _whole_block(block: Block) -> dict[str, Any]:
    empty = _empty_block(block)
    match block.kind:
        case BlockKind.CALL:
            return empty | {"input": json.loads(block.text)}
        case BlockKind.REASONING:
            return empty | {"thinking": block.text}
        case BlockKind.TEXT:
            return empty | {"text": block.text}


def _call_id(block: Block) -> str:
    """The model's own id, where it gave one."""
    if block.call is not None and block.call.id:
        return block.call.id
    return block.id


def _usage(prompt_tokens: int, cached_tokens: int, output_tokens: int) -> dict[str, int]:
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_read_input_tokens": cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": output_tokens,
    }


def _final(usage: Usage) -> dict[str, int]:
    details = usage.prompt_tokens_details
    cached_tokens = details.cached_tokens if details is not None else 0
    return _usage(usage.prompt_tokens, cached_tokens, usage.completion_tokens)
