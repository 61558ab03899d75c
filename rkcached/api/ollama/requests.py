"""Requests of Ollama's API, and the internal ones that they mean. Pure.

Ollama ignores what it does not know, so its clients send it: such parameters are named in the
answer and change nothing. What would change the answer and cannot be done is refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from pydantic import ConfigDict, Field

from rkcached.api.bodies import valid
from rkcached.api.requests import ChatRequest, CompletionRequest, EmbeddingRequest, Whole
from rkcached.errors import RequestError
from rkcached.messages.record import Many, Name, Record

_LATEST = ":latest"


class _Lenient(Record):
    model_config = ConfigDict(extra="allow", defer_build=True)

    def unknown(self) -> Iterator[str]:
        """The names of parameters that mean nothing here."""
        for name, value in (self.model_extra or {}).items():
            if value is not None:
                yield name


class Options(_Lenient):
    """Those that a run can have. Others say how Ollama loads a model, or are of older samplers."""

    num_predict: Whole | None = None
    seed: Whole | None = None
    temperature: float | None = None
    top_k: Whole | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | Many[str] | None = None

    def parameters(self) -> dict[str, Any]:
        """In the internal request's names."""
        values = self.model_dump(include=set(type(self).model_fields), exclude_none=True)
        limit = values.pop("num_predict", -1)
        if limit > 0:  # -1 and -2: as many as fit
            values["max_tokens"] = limit
        if not values.get("stop"):
            values.pop("stop", None)
        return values


class _Request(_Lenient):
    model: Name
    options: Options | None = None
    keep_alive: Any = Field(
        default=None, description="Ignored: idle_unload_s in the manifest decides."
    )

    def ignored(self) -> list[str]:
        """The names of what the client sent and nothing was done about."""
        names = list(self.unknown())
        if self.options is not None:
            names += [f"options.{name}" for name in self.options.unknown()]
        if self.keep_alive is not None:
            names.append("keep_alive")
        return names


class _Generation(_Request):
    stream: bool = True
    format: str | dict[str, Any] | None = Field(
        default=None, description="`json`, or a JSON schema."
    )
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None

    def shared(self, model: str) -> dict[str, Any]:
        """The values that a conversation and a text have in common."""
        values: dict[str, Any] = {"model": model, "stream": self.stream}
        if self.options is not None:
            values |= self.options.parameters()
        return values

    def chat(self, model: str, messages: list[dict[str, Any]], **more: Any) -> ChatRequest:
        """The internal request for this conversation. Errors: RequestError."""
        values = {**self.shared(model), "messages": messages, **more}
        if self.format == "json":
            values["response_format"] = {"type": "json_object"}
        elif isinstance(self.format, dict):
            named = {"name": "format", "schema": self.format}
            values["response_format"] = {"type": "json_schema", "json_schema": named}
        elif self.format:
            raise _refused("format", "it is neither json nor a JSON schema")
        if self.think is not None:
            values["think"] = self.think
        if self.logprobs:
            values["logprobs"] = True
            values["top_logprobs"] = self.top_logprobs
        return valid(ChatRequest, values, self.ignored())


class CalledFunction(_Lenient):
    name: str
    arguments: dict[str, Any] | str | None = None


class Call(_Lenient):
    id: str | None = None
    function: CalledFunction


class Message(_Lenient):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: Any = None
    tool_calls: Many[Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaChatRequest(_Generation):
    """`POST /api/chat`. Without messages it loads the model."""

    messages: Many[Message] | None = None
    tools: Any = None

    def internal(self, model: str) -> ChatRequest:
        """Errors: RequestError."""
        more = {"tools": self.tools} if self.tools else {}
        return self.chat(model, list(_conversation(self.messages or [])), **more)


class OllamaGenerateRequest(_Generation):
    """`POST /api/generate`. Without a prompt it loads the model."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = Field(
        default=None, description="true: send the prompt without the chat template."
    )
    suffix: str | None = None
    template: str | None = None
    images: Any = None
    context: Any = Field(default=None, description="Ignored, as Ollama gave it up: use /api/chat.")

    def internal(self, model: str) -> ChatRequest | CompletionRequest:
        """Errors: RequestError."""
        for name in ("suffix", "template"):
            if getattr(self, name):
                raise _refused(name, "it is not supported; leave it out")
        if self.images:
            raise _refused("images", _NO_IMAGES)
        if self.raw:
            values = {**self.shared(model), "prompt": self.prompt}
            return valid(CompletionRequest, values, self.ignored())

        messages = [{"role": "user", "content": self.prompt}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return self.chat(model, messages)

    def ignored(self) -> list[str]:
        return [*super().ignored(), *(["context"] if self.context else ())]


class OllamaEmbedRequest(_Request):
    """`POST /api/embed`, and `/api/embeddings` with `prompt` for one text."""

    input: str | Many[str] | None = None
    prompt: str | None = None
    truncate: bool | None = Field(
        default=None, description="Ignored: a text that is too long is refused."
    )
    dimensions: Whole | None = None

    def internal(self, model: str) -> EmbeddingRequest:
        """Errors: RequestError."""
        if self.dimensions:
            raise _refused("dimensions", "the model decides how many there are; leave it out")
        texts = self.prompt if self.input is None else self.input
        return valid(EmbeddingRequest, {"model": model, "input": texts})


class OllamaModelRequest(_Lenient):
    """`POST /api/show`."""

    model: Name | None = None
    name: Name | None = Field(default=None, description="An older word for model.")


_NO_IMAGES = "models here read text only; leave it out"


def known_name(name: str, known: Collection[str]) -> str:
    """The name of a model, or `model/prompt`, as it is declared.

    Ollama's users write a tag: `smol:latest` is smol, and `qwen3:0.6b` is qwen3-0.6b if there is
    such a model.
    """
    plain = name.removesuffix(_LATEST)
    if plain in known or ":" not in plain:
        return plain
    dashed = plain.replace(":", "-")
    return dashed if dashed in known else plain


def _conversation(messages: list[Message]) -> Iterator[dict[str, Any]]:
    """Messages as OpenAI has them: a call has an id, which its result names.

    Errors: RequestError.
    """
    open_calls: list[tuple[str, str]] = []  # name and id, until their results come
    count = 0
    for at, message in enumerate(messages):
        if message.images:
            raise _refused(f"messages[{at}].images", _NO_IMAGES)
        written: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            written["thinking"] = message.thinking
        if message.tool_calls:
            written["tool_calls"] = calls = []
            for call in message.tool_calls:
                count += 1
                known = call.id or f"call_{count}"
                open_calls.append((call.function.name, known))
                function = {"name": call.function.name, "arguments": _text_of(call.function)}
                calls.append({"id": known, "type": "function", "function": function})
        if message.role == "tool":
            written["tool_call_id"] = message.tool_call_id or _answered(
                open_calls, message.tool_name
            )
        yield written


def _answered(open_calls: list[tuple[str, str]], name: str | None) -> str:
    """The id of the call that a result belongs to: the first that waits, by its name if told."""
    for at, (called, known) in enumerate(open_calls):
        if name is None or called == name:
            del open_calls[at]
            return known
    return "call_0"


def _text_of(function: CalledFunction) -> str:
    if isinstance(function.arguments, str):
        return function.arguments
    return json.dumps(function.arguments or {}, ensure_ascii=False)


def _refused(param: str, why: str) -> RequestError:
    return RequestError(400, f"{param}: {why}", code="unsupported_parameter", param=param)
