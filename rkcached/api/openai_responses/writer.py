"""The answers of OpenAI's Responses: their records, and the writer that makes them. Pure."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec
from pydantic import Field

from rkcached.api.blocks import Block, BlockKind, Blocks, Step, Steps
from rkcached.api.bodies import error_body, in_words_of
from rkcached.api.openai_responses.requests import ResponsesRequest
from rkcached.api.responses import Answer
from rkcached.engines.base import FinishReason
from rkcached.errors import RequestError
from rkcached.messages.reply import Reply
from rkcached.serving.job import End, Progress, Text
from rkcached.serving.report import CacheReport, Usage

_IDS = {BlockKind.TEXT: "msg_", BlockKind.REASONING: "rs_", BlockKind.CALL: "fc_"}

_NAMES = {
    "response_format": "text.format",
    "messages": "input",
    "max_tokens": "max_output_tokens",
}
"""Of parameters that the translation renames."""

_PARTS = {BlockKind.TEXT: "output_text", BlockKind.REASONING: "reasoning_text"}

_ItemStatus = Literal["completed", "incomplete"]


class OutputText(Answer):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(Answer):
    type: Literal["message"] = "message"
    id: str
    status: _ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class OutputCall(Answer):
    type: Literal["function_call"] = "function_call"
    id: str
    status: _ItemStatus
    call_id: str
    name: str
    arguments: str


class OutputReasoningText(Answer):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputReasoning(Answer):
    type: Literal["reasoning"] = "reasoning"
    id: str
    status: _ItemStatus
    summary: list[Any]
    content: list[OutputReasoningText]


class InputTokensDetails(Answer):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Answer):
    reasoning_tokens: int = Field(default=0, description="Not counted: always 0.")


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens"]


class ResponseAnswer(Answer):
    """The answer of `POST /v1/responses`."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    error: None = None
    incomplete_details: IncompleteDetails | None
    instructions: None = Field(default=None, description="Not repeated.")
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputMessage | OutputCall | OutputReasoning]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[Any] = Field(description="Not repeated: always empty.")
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage
    rkcached: CacheReport


def responses_error(error: RequestError) -> dict[str, Any]:
    """OpenAI's error envelope, with the names of this interface."""
    return error_body(in_words_of(error, _NAMES))


class ResponsesWriter:
    media_type = "text/event-stream"

    def __init__(self, request: ResponsesRequest, reply: Reply) -> None:
        self._head = _head(request)
        self._blocks = Blocks(reply, _IDS, one_call=request.parallel_tool_calls is False)
        self._is_begun = False
        self._sequence = 0

    def waiting(self) -> bytes:
        return b": waiting\n\n" if self._is_begun else self._begin()

    def progress(self, _: Progress) -> bytes:
        return b""

    def piece(self, text: Text) -> bytes:
        return self._written(self._blocks.feed(text.text))

    def end(self, end: End) -> bytes:
        # Whether the last item is complete depends on how the answer has ended.
        status = _status(end)
        written = self._written(self._blocks.end(), status)
        if not self._is_begun:  # an answer without a letter
            written = self._begin()
        response = self._finished(end)
        return written + self._event(f"response.{status}", response=response)

    def error(self, error: RequestError) -> bytes:
        worded = responses_error(error)["error"]
        code = "invalid_prompt" if error.status < 500 else "server_error"
        failure = {"code": code, "message": worded["message"]}
        response = {**self._head, "status": "failed", "error": failure}
        return self._event("response.failed", response=response)

    def whole(self, texts: Iterable[Text], end: End) -> ResponseAnswer:
        for text in texts:
            for _ in self._blocks.feed(text.text):
                pass
        for _ in self._blocks.end():
            pass
        return ResponseAnswer.model_validate(self._finished(end))

    def _begin(self) -> bytes:
        self._is_begun = True
        created = self._event("response.created", response=self._head)
        return created + self._event("response.in_progress", response=self._head)

    def _written(self, steps: Steps, status: str = "completed") -> bytes:
        written = b""
        for step, block, text in steps:
            if not self._is_begun:
                written += self._begin()
            match step:
                case Step.BEGIN:
                    written += b"".join(self._block_begin(block))
                case Step.PIECE:
                    written += self._block_event(f"{_name(block)}.delta", block, delta=text)
                case Step.END:
                    written += b"".join(self._block_end(block, status))
        return written

    def _block_begin(self, block: Block) -> Iterator[bytes]:
        item = _item(block, "in_progress") | _EMPTY[block.kind]
        yield self._event("response.output_item.added", output_index=block.index, item=item)
        if block.call is None:
            part = _part(block, "")
            yield self._block_event("response.content_part.added", block, part=part)

    def _block_end(self, block: Block, status: str) -> Iterator[bytes]:
        whole = {"arguments" if block.call is not None else "text": block.text}
        yield self._block_event(f"{_name(block)}.done", block, **whole)
        if block.call is None:
            part = _part(block, block.text)
            yield self._block_event("response.content_part.done", block, part=part)
        item = _item(block, "completed" if block.call is not None else status)
        yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _block_event(self, kind: str, block: Block, **fields: Any) -> bytes:
        """An event about what is in an item."""
        place: dict[str, Any] = {"item_id": block.id, "output_index": block.index}
        if block.call is None:
            place["content_index"] = 0
        if kind.startswith("response.output_text."):
            place["logprobs"] = []
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        """A server-sent event with the name of its type."""
        data = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(data))

    def _finished(self, end: End) -> dict[str, Any]:
        status = _status(end)
        is_complete = status == "completed"
        blocks = self._blocks.done
        output = [_item(block, "completed") for block in blocks]
        if blocks and blocks[-1].call is None:
            output[-1]["status"] = status
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if is_complete else None,
            "incomplete_details": None if is_complete else {"reason": "max_output_tokens"},
            "output": output,
            "usage": _usage(end.usage),
            "rkcached": end.report,
        }


def _head(request: ResponsesRequest) -> dict[str, Any]:
    """The response before it has an output.

    It does not repeat the instructions and the tools: each of three events would have all of them,
    and they may be megabytes.
    """
    choice: Any = request.tool_choice or "auto"
    if not isinstance(choice, str):
        choice = choice.model_dump()
    wanted = request.text.format if request.text is not None else None
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": request.max_output_tokens,
        "metadata": {},
        "model": request.model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": request.temperature,
        "text": {"format": wanted.model_dump(by_alias=True) if wanted else {"type": "text"}},
        "tool_choice": choice,
        "tools": [],
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None,
    }


_EMPTY: dict[BlockKind, dict[str, Any]] = {
    BlockKind.TEXT: {"content": []},
    BlockKind.REASONING: {"content": []},
    BlockKind.CALL: {"arguments": ""},
}
"""The fields of an item that fill up later."""


def _name(block: Block) -> str:
    """The name that the events of its pieces begin with."""
    if block.call is not None:
        return "response.function_call_arguments"
    return f"response.{_PARTS[block.kind]}"


def _part(block: Block, text: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": _PARTS[block.kind], "text": text}
    if block.kind is BlockKind.TEXT:
        part |= {"annotations": [], "logprobs": []}
    return part


def _item(block: Block, status: str) -> dict[str, Any]:
    item: dict[str, Any] = {"id": block.id, "status": status}
    if block.call is not None:
        call_id = block.call.id or block.id.replace("fc_", "call_")
        called = {"call_id": call_id, "name": block.call.name, "arguments": block.text}
        return item | {"type": "function_call"} | called
    if block.kind is BlockKind.REASONING:
        return item | {"type": "reasoning", "summary": [], "content": [_part(block, block.text)]}
    return item | {"type": "message", "role": "assistant", "content": [_part(block, block.text)]}


def _status(end: End) -> str:
    return "completed" if end.finish is FinishReason.STOP else "incomplete"


def _usage(usage: Usage) -> dict[str, Any]:
    details = usage.prompt_tokens_details
    cached_tokens = details.cached_tokens if details is not None else 0
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
