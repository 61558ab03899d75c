"""Answers of Ollama's API, and the writer of their streams: a JSON document in each line."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import msgspec
from pydantic import Field

from rkcached.api.endpoints import Surface
from rkcached.api.responses import Answer
from rkcached.engines.base import TokenLogprob
from rkcached.errors import RequestError
from rkcached.messages.reply import Delta, Reply
from rkcached.serving.job import End, Progress, Text

NDJSON = "application/x-ndjson"


class OllamaError(Answer):
    error: str


def _error_body(error: RequestError) -> dict[str, Any]:
    return {"error": f"{error.message} ({error.hint})" if error.hint else error.message}


OLLAMA = Surface(error_record=OllamaError, error_body=_error_body)


class OllamaAnswer(Answer):
    """An answer, or the last line of its stream. Durations are in nanoseconds."""

    model: str
    created_at: str
    message: dict[str, Any] | None = Field(default=None, exclude_if=lambda value: value is None)
    response: str | None = Field(default=None, exclude_if=lambda value: value is None)
    thinking: str | None = Field(default=None, exclude_if=lambda value: value is None)
    logprobs: list[dict[str, Any]] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    done: bool
    done_reason: str
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0
    rkcached: dict[str, Any] | None = Field(default=None, exclude_if=lambda value: value is None)


class OllamaVectors(Answer):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int = 0
    prompt_eval_count: int


class OllamaVector(Answer):
    embedding: list[float]


class OllamaDetails(Answer):
    parent_model: str = ""
    format: str
    family: str
    families: list[str]
    parameter_size: str = ""
    quantization_level: str = ""


class OllamaModel(Answer):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaModels(Answer):
    models: list[OllamaModel]


class OllamaLoadedModel(Answer):
    name: str
    model: str
    size: int
    digest: str
    details: OllamaDetails
    expires_at: str
    size_vram: int = 0
    context_length: int


class OllamaLoadedModels(Answer):
    models: list[OllamaLoadedModel]


class OllamaShown(Answer):
    modelfile: str = ""
    parameters: str = ""
    template: str = ""
    license: str = ""
    modified_at: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]


class OllamaVersion(Answer):
    version: str
    rkcached: str


class OllamaWriter:
    """Writes the lines of an answer; `is_chat` has them as messages, else as pieces of a text."""

    media_type = NDJSON

    def __init__(self, model: str, reply: Reply | None, *, is_chat: bool) -> None:
        self._model = model
        self._reply = reply
        self._is_chat = is_chat
        self._begun_at = time.monotonic()

    def waiting(self) -> bytes:
        return self._line(self._words(Delta()))

    def progress(self, progress: Progress) -> bytes:
        del progress  # its clients know none
        return b""

    def piece(self, text: Text) -> bytes:
        logprobs = _logprobs(text.logprobs)
        lines = b""
        for delta in self._deltas(text):
            lines += self._line(self._words(delta) | logprobs)
            logprobs = {}
        return lines

    def end(self, end: End) -> bytes:
        rest = self._reply.end() if self._reply else ()
        lines = b"".join(self._line(self._words(delta)) for delta in rest)
        words = self._words(Delta())
        return lines + msgspec.json.encode(self._figures(words, end)) + b"\n"

    def error(self, error: RequestError) -> bytes:
        return msgspec.json.encode(_error_body(error)) + b"\n"

    def whole(self, texts: Iterable[Text], end: End) -> OllamaAnswer:
        deltas: list[Delta] = []
        tokens: list[TokenLogprob] = []
        for text in texts:
            deltas += self._deltas(text)
            tokens += text.logprobs
        deltas += self._reply.end() if self._reply else ()

        content = "".join(delta.content for delta in deltas)
        thinking = "".join(delta.reasoning for delta in deltas)
        calls = [_call(delta) for delta in deltas if delta.call is not None]
        words = self._words(Delta(content=content))
        place = words["message"] if self._is_chat else words
        if thinking:
            place["thinking"] = thinking
        if calls:
            place["tool_calls"] = calls
        return OllamaAnswer.model_validate(self._figures(words | _logprobs(tokens), end))

    def _deltas(self, text: Text) -> Iterator[Delta]:
        if self._reply is None:
            yield Delta(content=text.text)
        else:
            yield from self._reply.feed(text.text)

    def _words(self, delta: Delta) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if delta.reasoning:
            more["thinking"] = delta.reasoning
        if delta.call is not None:
            more["tool_calls"] = [_call(delta)]
        if self._is_chat:
            return {"message": {"role": "assistant", "content": delta.content, **more}}
        return {"response": delta.content, **more}

    def _line(self, words: dict[str, Any]) -> bytes:
        return msgspec.json.encode({**self._head(), **words, "done": False}) + b"\n"

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": now()}

    def _figures(self, words: dict[str, Any], end: End) -> dict[str, Any]:
        report = end.report
        decode_s = 0.0
        if report.decode_tokens_per_s:
            decode_s = end.usage.completion_tokens / report.decode_tokens_per_s
        return {
            **self._head(),
            **words,
            "done": True,
            "done_reason": "length" if end.finish.value == "length" else "stop",
            "total_duration": ns(time.monotonic() - self._begun_at),
            "load_duration": ns((report.model_load_ms + report.load_ms) / 1000),
            "prompt_eval_count": end.usage.prompt_tokens,
            "prompt_eval_duration": ns(report.prefill_ms / 1000),
            "eval_count": end.usage.completion_tokens,
            "eval_duration": ns(decode_s),
            "rkcached": asdict(report),
        }


def _call(delta: Delta) -> dict[str, Any]:
    """Its arguments are an object here; a text that is none stays a text."""
    if delta.call is None:
        raise TypeError(delta)
    arguments: Any = delta.call.arguments
    with contextlib.suppress(msgspec.DecodeError):
        arguments = msgspec.json.decode(arguments)
    return {"function": {"name": delta.call.name, "arguments": arguments}}


def _logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    listed = [
        {
            "token": token.text,
            "logprob": token.logprob,
            "top_logprobs": [
                {"token": other.text, "logprob": other.logprob} for other in token.likeliest
            ],
        }
        for token in tokens
    ]
    return {"logprobs": listed} if listed else {}


def ns(seconds: float) -> int:
    return int(seconds * 1e9)


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
