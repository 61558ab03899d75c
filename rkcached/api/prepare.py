"""From a request to what an engine is asked: which model and prompt, the rendered text, the sampling. Or why not.

Every refusal is a RequestError with its HTTP status, OpenAI's code and the next thing to do.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rkcached import errors
from rkcached.api.requests import (
    ChatRequest,
    CompletionRequest,
    JsonObject,
    JsonSchema,
    NamedTool,
    Tool,
)
from rkcached.engines.base import Sampling
from rkcached.engines.registry import ENGINES
from rkcached.errors import RequestError
from rkcached.messages.reply import Reply
from rkcached.messages.template import ChatTemplate, Message, ToolStyle
from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.snapshot import Snapshot
from rkcached.sources.records import Key, Trouble
from rkcached.worker.schemas import MAX_SCHEMA_BYTES, SchemaChecker


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request, ready to run."""

    model: DesiredModel
    named: Key | None
    """The prompt that was asked for by name."""
    prompt: str
    """The whole rendered request."""
    sampling: Sampling
    cold: bool
    accepted: float
    """Monotonic seconds."""
    with_tools: bool = False
    text: str = "messages"
    """The parameter that has the text."""
    binds: str = ""
    """The parameter that says what the answer must look like."""
    correct: Callable[[str, str], Awaitable[str]] | None = None
    """From an answer that does not fit its schema, and why, the request to try once more with."""


_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demand:
    """What a request wants its answer to be."""

    tools: tuple[Tool, ...] = ()
    """Those that the model is shown."""
    schema: dict[str, Any] | None = None
    """Of the JSON that the whole answer must be."""
    is_call: bool = False
    """The schema is that of a tool call."""

    @property
    def binds(self) -> str:
        """The parameter that the schema is of."""
        return "tools" if self.is_call else "response_format"


class Preparation:
    def __init__(self, view: Callable[[], Snapshot]) -> None:
        self._view = view
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")
        """For templates that may wait: they are rendered one by one, and a slow one keeps no other
        thread."""
        self._schemas = SchemaChecker()
        self._schema_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="schema")

    async def chat(self, request: ChatRequest, accepted: float) -> tuple[Job, Reply]:
        """Check a request against what is declared, and render it. Errors: RequestError."""
        name, slash, wanted = request.model.partition("/")
        model = self._answering(name)
        demand = _demand(request, model)
        param, cache = "model", request.wanted_cache
        if isinstance(cache, str) and wanted and cache != wanted:
            raise RequestError(
                400,
                f"model names the prompt {wanted!r}, cache names {cache!r}",
                code="conflict",
                param="cache",
            )
        if isinstance(cache, str):
            param, wanted = "cache" if request.cache is not None else "use_cache", cache
        messages = [message.plain() for message in request.messages]
        named = Key(name, wanted) if wanted or slash else None
        if named is not None:
            messages = self._with_prompt(named, messages, param)
        if any("\0" in message["content"] for message in messages):
            raise _nul("messages")
        tools = [tool.plain() for tool in demand.tools]
        prompt = await self._render(model.template, messages, tools)
        values: dict[str, Any] = (
            model.config.sampling(named.prompt if named else None) | request.sampling()
        )

        async def correct(answer: str, why: str) -> str:
            wanted = f"{why}. Answer with nothing but JSON that fits this JSON schema: {values['json_schema']}"
            said = [Message(role="assistant", content=answer), Message(role="user", content=wanted)]
            return await self._render(model.template, [*messages, *said], tools)

        if demand.schema is not None:
            values["json_schema"] = await self._checked(demand)
        job = Job(
            model=model,
            named=named,
            prompt=prompt,
            sampling=Sampling(**values),
            cold=request.wanted_cache is False,
            accepted=accepted,
            with_tools=bool(demand.tools),
            binds=demand.binds,
            correct=correct if demand.schema is not None else None,
        )
        reply = Reply(
            style=model.template.tools if demand.tools else None,
            tools=frozenset(tool.function.name for tool in demand.tools),
            forced=demand.is_call,
            reasons=prompt.rstrip().endswith("<think>") and demand.schema is None,
        )
        return job, reply

    async def _checked(self, demand: _Demand) -> str:
        """The schema as text, which a run can be held to. Errors: RequestError."""
        text = json.dumps(demand.schema)
        if demand.schema == _ANY_OBJECT:
            return text
        try:
            if len(text) > MAX_SCHEMA_BYTES:
                raise errors.SchemaInvalid(
                    f"the schema is larger than {MAX_SCHEMA_BYTES:,} bytes", hint="simplify it"
                )
            compiled = ENGINES[self._view().manifest.engine.kind].compiles_schemas
            check = functools.partial(self._schemas.check, text, compiled=compiled)
            await asyncio.get_running_loop().run_in_executor(self._schema_thread, check)
        except errors.RkcachedError as error:
            raise as_request_error(error, binds=demand.binds) from error
        return text

    def close(self) -> None:
        """Stop looking at schemas: what waits for that is refused."""
        self._schemas.kill()

    async def _render(
        self, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> str:
        """Errors: RequestError."""
        try:
            if not template.may_wait:
                return template.render(messages, tools)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, template.render, messages, tools)
        except errors.TemplateExhausted as error:
            raise RequestError(
                503, error.message, code="template_exhausted", hint=error.hint
            ) from error
        except errors.TemplateError as error:
            raise RequestError(
                400, error.message, code="template_error", param="messages", hint=error.hint
            ) from error

    def completion(self, request: CompletionRequest, accepted: float) -> Job:
        """Check a request whose text goes to the model as it is. Errors: RequestError."""
        name, _, prompt = request.model.partition("/")
        if prompt or isinstance(request.wanted_cache, str):
            raise RequestError(
                400,
                "a plain completion has no system message, so no prompt can be chosen by name",
                code="unsupported_parameter",
                param="model" if prompt else "cache",
                hint=f"ask for the model {name!r}, or use /v1/chat/completions",
            )
        if not request.text:
            raise RequestError(
                400,
                "the prompt is empty",
                code="invalid_value",
                param="prompt",
                hint="send its text",
            )
        if "\0" in request.text:
            raise _nul("prompt")
        model = self._answering(name)
        values: dict[str, Any] = model.config.sampling(None) | request.sampling()
        return Job(
            model=model,
            named=None,
            prompt=request.text,
            text="prompt",
            sampling=Sampling(**values),
            cold=request.wanted_cache is False,
            accepted=accepted,
        )

    def embedding(self, name: str) -> DesiredModel:
        """A model that makes vectors. Errors: RequestError."""
        model = self.model(name)
        if not model.config.embedding:
            raise RequestError(
                400,
                f"the model {name!r} makes no embeddings",
                code="model_not_embedding",
                param="model",
                hint="ask a model that the manifest declares with embedding: true",
            )
        return model

    def _answering(self, name: str) -> DesiredModel:
        model = self.model(name)
        if model.config.embedding:
            raise RequestError(
                400,
                f"the model {name!r} makes embeddings only",
                code="model_is_embedding",
                param="model",
                hint="use /v1/embeddings",
            )
        return model

    def model(self, name: str) -> DesiredModel:
        view = self._view()
        model = view.model(name)
        if model is None:
            known = ", ".join(sorted(view.desired.models)) or "none"
            raise RequestError(
                404,
                f"the model {name!r} does not exist; known models: {known}",
                code="model_not_found",
                param="model",
            )
        if isinstance(model, Trouble):
            raise RequestError(
                503,
                f"the model {name!r} cannot be used: {model.message}",
                code="model_unavailable",
                hint=model.hint,
            )
        return model

    def _with_prompt(self, key: Key, messages: list[Message], param: str) -> list[Message]:
        """The messages with the prompt as their system message."""
        view = self._view()
        text = view.desired.texts.get(key)
        if text is None:
            declared = view.desired.prompts.get(key)
            if declared is None and (unlisted := view.desired.unlisted.get(key.model)) is not None:
                message = f"the prompt {key} is not known: {unlisted.message}"
                raise RequestError(503, message, code="prompt_blocked", hint=unlisted.hint)
            if declared is None:
                known = (
                    ", ".join(k.prompt for k in view.desired.prompts if k.model == key.model)
                    or "none"
                )
                raise RequestError(
                    404,
                    f"the model {key.model!r} has no prompt {key.prompt!r}; known prompts: {known}",
                    code="prompt_not_found",
                    param=param,
                )
            trouble = declared.trouble or Trouble(message="it has no text")
            raise RequestError(
                503,
                f"the prompt {key} cannot be used: {trouble.message}",
                code="prompt_blocked",
                hint=trouble.hint,
            )
        systems = [message["content"] for message in messages if message["role"] == "system"]
        if any(system.rstrip("\r\n") != text for system in systems):
            raise RequestError(
                409,
                f"the request has a system message of its own, and it is not the prompt {key}",
                code="system_message_conflict",
                param="messages",
                hint=f"leave the system message out, or ask for the model {key.model!r} without a prompt",
            )
        return [
            Message(role="system", content=text),
            *(m for m in messages if m["role"] != "system"),
        ]


def _demand(request: ChatRequest, model: DesiredModel) -> _Demand:
    """Tools and format of the answer. Errors: RequestError for what cannot be had."""
    choice = request.tool_choice
    tools = () if choice == "none" else tuple(request.tools or ())
    wanted = request.response_format
    if not tools and (isinstance(choice, NamedTool) or choice == "required"):
        raise RequestError(
            400, "there are no tools to choose from", code="invalid_value", param="tool_choice"
        )
    if tools and model.template.tools is None:
        raise RequestError(
            400,
            f"the chat template of {model.name!r} cannot show tools",
            code="unsupported_parameter",
            param="tools",
            hint="leave tools out, or name a chat_template that knows them, such as chatml or llama3",
        )
    style = model.template.tools or ToolStyle.HERMES
    if isinstance(choice, NamedTool):
        known = {tool.function.name: tool for tool in tools}
        if choice.function.name not in known:
            said = f"there is no tool {choice.function.name!r}"
            raise RequestError(
                400,
                said,
                code="invalid_value",
                param="tool_choice",
                hint=f"one of {', '.join(known)}",
            )
        return _Demand(
            tools=tools, schema=known[choice.function.name].call_schema(style), is_call=True
        )
    if choice == "required":
        calls = [tool.call_schema(style, f"#/anyOf/{at}") for at, tool in enumerate(tools)]
        return _Demand(tools=tools, schema={"anyOf": calls}, is_call=True)
    if isinstance(wanted, JsonObject | JsonSchema) and tools:
        raise RequestError(
            400,
            "an answer cannot be free to call tools and bound to a format",
            code="unsupported_parameter",
            param="response_format",
            hint="leave one of tools and response_format out",
        )
    if isinstance(wanted, JsonObject):
        return _Demand(schema=_ANY_OBJECT)
    if isinstance(wanted, JsonSchema):
        return _Demand(schema=wanted.json_schema.schema_)
    return _Demand(tools=tools)


_FACES: dict[type[errors.RkcachedError], tuple[int, str, str | None, int]] = {
    errors.InputInvalid: (400, "invalid_value", "input", 0),
    errors.SchemaMismatch: (422, "answer_does_not_fit", None, 0),
    errors.ModelLoadError: (503, "model_unavailable", None, 5),
    errors.RuntimeLibraryError: (503, "model_unavailable", None, 5),
    errors.WorkerUnavailable: (503, "worker_unavailable", None, 5),
    errors.ModelReplaced: (503, "model_unavailable", None, 1),
    errors.WorkerTimeout: (504, "worker_timeout", None, 0),
    errors.WorkerDied: (502, "worker_died", None, 0),
}
"""Status, code, param and seconds until a retry makes sense."""


def as_request_error(
    error: errors.RkcachedError, *, text: str = "messages", binds: str = "response_format"
) -> RequestError:
    """The HTTP face of every error that a run can end with; `text` and `binds` are the parameters that it is about."""
    match error:
        case RequestError():
            return error
        case errors.ContextExceeded():
            return RequestError(
                400,
                f"the request has {error.tokens} tokens, the context holds {error.limit}",
                code="context_length_exceeded",
                param=text,
                hint=error.remedy(text),
            )
        case errors.SamplingFixed():
            param = error.param or None
            return RequestError(
                400, error.message, code="unsupported_parameter", param=param, hint=error.hint
            )
        case errors.SchemaInvalid():
            return RequestError(
                400, error.message, code="invalid_schema", param=binds, hint=error.hint
            )
        case _:
            status, code, param, retry_after_s = _FACES.get(
                type(error), (500, "engine_error", None, 0)
            )
            return RequestError(
                status,
                error.message,
                code=code,
                param=param,
                hint=error.hint,
                retry_after_s=retry_after_s,
            )


def _nul(param: str) -> RequestError:
    return RequestError(
        400,
        "the text has a NUL character",
        code="invalid_value",
        param=param,
        hint="many runtimes stop reading there",
    )
