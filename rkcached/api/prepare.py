"""Turns a checked body into a job for serving: model and prompt, rendered text, sampling, schema.

Every refusal is a RequestError with its HTTP status, OpenAI's code and the next thing to do.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from rkcached import errors
from rkcached.api.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    JsonObject,
    JsonSchema,
    NamedTool,
    Tool,
)
from rkcached.engines.base import Sampling
from rkcached.engines.kinds import EngineKind
from rkcached.engines.registry import ENGINES
from rkcached.errors import RequestError
from rkcached.messages.detection import AnswerForm
from rkcached.messages.message import Message
from rkcached.messages.reply import Reply
from rkcached.messages.template import ChatTemplate
from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.snapshot import Published, Snapshot
from rkcached.serving.embeddings import EmbeddingInput
from rkcached.serving.failures import as_request_error
from rkcached.serving.job import Job
from rkcached.serving.models import find_embedding_model, find_text_model
from rkcached.sources.records import Key, Trouble
from rkcached.worker.schemas import MAX_SCHEMA_BYTES, SchemaChecker

_ANY_OBJECT = {"type": "object"}

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demand:
    """The demands of a request on its answer."""

    tools: tuple[Tool, ...] = ()
    """Those that the model is shown."""
    schema: dict[str, Any] | None = None
    """Of the JSON that the whole answer must be."""
    is_call: bool = False
    """The schema is that of a tool call."""

    @property
    def schema_param(self) -> str:
        """The parameter that the schema comes from."""
        return "tools" if self.is_call else "response_format"


class Preparation:
    def __init__(self, published: Published) -> None:
        self._published = published
        # Templates that may wait are rendered one by one, so a slow one blocks no other thread.
        self._render_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")
        self._schema_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="schema")
        self._schemas = SchemaChecker()

    def close(self) -> None:
        """Stop checking schemas: the requests that wait for a check are refused."""
        self._schemas.kill()

    async def chat(self, request: ChatRequest, accepted: float) -> tuple[Job, Reply]:
        """Check a request against what is declared, and render it.

        `accepted` is in monotonic seconds. Errors: RequestError.
        """
        snapshot = self._published.now
        model = find_text_model(snapshot, request.model.partition("/")[0])
        form = await self._in_template(model.template, lambda: model.template.answer)
        demand = _demand(request, model, form, snapshot.manifest.engine.kind)
        named, param = _named_prompt(request)

        messages = [message.plain() for message in request.messages]
        if named is not None:
            messages = _with_prompt(snapshot, named, messages, param)
        if any("\0" in message["content"] for message in messages):
            raise _nul("messages")
        tools = [tool.plain() for tool in demand.tools]
        template = model.template_for(named.prompt if named else None)
        prompt = await self._render(template, messages, tools)

        declared = model.config.sampling(named.prompt if named else None)
        values: dict[str, Any] = declared | request.sampling()
        correct = None
        if demand.schema is None:
            values["shown_tokens"] = _shown_tokens(form, demand)
        else:
            values["json_schema"] = await self._checked(demand)
            correct = self._second_try(template, messages, tools, values["json_schema"])

        job = Job(
            model=model,
            named=named,
            prompt=prompt,
            sampling=Sampling(**values),
            cold=request.wanted_cache is False,
            accepted=accepted,
            with_tools=bool(demand.tools),
            schema_param=demand.schema_param,
            correct=correct,
        )
        reply = Reply(
            form=form.calls if demand.tools else None,
            tools={tool.function.name: tool.arguments_schema for tool in demand.tools},
            marks=form.marks,
            forced=demand.is_call,
            reasons=form.marks.begun(prompt) and demand.schema is None,
        )
        return job, reply

    def completion(self, request: CompletionRequest, accepted: float) -> Job:
        """Check a request whose text goes to the model as it is.

        `accepted` is in monotonic seconds. Errors: RequestError.
        """
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

        model = find_text_model(self._published.now, name)
        values: dict[str, Any] = model.config.sampling(None) | request.sampling()
        return Job(
            model=model,
            named=None,
            prompt=request.text,
            text_param="prompt",
            sampling=Sampling(**values),
            cold=request.wanted_cache is False,
            accepted=accepted,
        )

    def embedding(self, request: EmbeddingRequest) -> tuple[str, list[EmbeddingInput]]:
        """The name of the model and the inputs. Errors: RequestError."""
        model = find_embedding_model(self._published.now, request.model)
        inputs = list(request.each())
        if any(isinstance(content, str) and "\0" in content for content in inputs):
            raise _nul("input")
        return model.name, inputs

    async def _render(
        self, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> str:
        """Errors: RequestError."""
        return await self._in_template(template, lambda: template.render(messages, tools))

    async def _in_template(self, template: ChatTemplate, work: Callable[[], Result]) -> Result:
        """Do what renders the template. Errors: RequestError."""
        try:
            if not template.may_wait:
                return work()
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._render_thread, work)
        except errors.TemplateExhausted as error:
            raise RequestError(
                503, error.message, code="template_exhausted", hint=error.hint
            ) from error
        except errors.TemplateError as error:
            raise RequestError(
                400, error.message, code="template_error", param="messages", hint=error.hint
            ) from error

    def _second_try(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        schema: str,
    ) -> Callable[[str, str], Awaitable[str]]:
        """Renders the conversation with the answer that does not fit, and with the reason."""

        async def correct(answer: str, why: str) -> str:
            order = f"Answer with nothing but JSON that fits this JSON schema: {schema}"
            more = [
                Message(role="assistant", content=answer),
                Message(role="user", content=f"{why}. {order}"),
            ]
            return await self._render(template, [*messages, *more], tools)

        return correct

    async def _checked(self, demand: _Demand) -> str:
        """The schema as text, once a run can be held to it. Errors: RequestError."""
        text = json.dumps(demand.schema)
        if demand.schema == _ANY_OBJECT:
            return text

        try:
            if len(text) > MAX_SCHEMA_BYTES:
                raise errors.SchemaInvalid(
                    f"the schema is larger than {MAX_SCHEMA_BYTES:,} bytes", hint="simplify it"
                )
            compiled = ENGINES[self._published.now.manifest.engine.kind].compiles_schemas
            check = functools.partial(self._schemas.check, text, compiled=compiled)
            await asyncio.get_running_loop().run_in_executor(self._schema_thread, check)
        except errors.RkcachedError as error:
            raise as_request_error(error, schema_param=demand.schema_param) from error
        return text


def _named_prompt(request: ChatRequest) -> tuple[Key | None, str]:
    """The prompt that is named, if any, and the parameter that names it. Errors: RequestError."""
    model, slash, prompt = request.model.partition("/")
    cache = request.wanted_cache
    if not isinstance(cache, str):
        named = Key(model, prompt) if slash else None
        return named, "model"

    if prompt and cache != prompt:
        raise RequestError(
            400,
            f"model names the prompt {prompt!r}, cache names {cache!r}",
            code="conflict",
            param="cache",
        )
    return Key(model, cache), "cache" if request.cache is not None else "use_cache"


def _with_prompt(
    snapshot: Snapshot, key: Key, messages: list[Message], param: str
) -> list[Message]:
    """The messages with the prompt as their system message. Errors: RequestError."""
    text = snapshot.desired.texts.get(key)
    if text is None:
        raise _no_text(snapshot, key, param)

    systems = [message["content"] for message in messages if message["role"] == "system"]
    if any(system.rstrip("\r\n") != text for system in systems):
        raise RequestError(
            409,
            f"the request has a system message of its own, and it is not the prompt {key}",
            code="system_message_conflict",
            param="messages",
            hint="leave the system message out, "
            f"or ask for the model {key.model!r} without a prompt",
        )
    others = [message for message in messages if message["role"] != "system"]
    return [Message(role="system", content=text), *others]


def _no_text(snapshot: Snapshot, key: Key, param: str) -> RequestError:
    """The reason why a prompt that was named has no text."""
    declared = snapshot.desired.prompts.get(key)
    if declared is not None:
        trouble = declared.trouble or Trouble(message="it has no text")
        return RequestError(
            503,
            f"the prompt {key} cannot be used: {trouble.message}",
            code="prompt_blocked",
            hint=trouble.hint,
        )

    unlisted = snapshot.desired.unlisted.get(key.model)
    if unlisted is not None:
        return RequestError(
            503,
            f"the prompt {key} is not known: {unlisted.message}",
            code="prompt_blocked",
            hint=unlisted.hint,
        )

    names = [other.prompt for other in snapshot.desired.prompts if other.model == key.model]
    known = ", ".join(names) or "none"
    return RequestError(
        404,
        f"the model {key.model!r} has no prompt {key.prompt!r}; known prompts: {known}",
        code="prompt_not_found",
        param=param,
    )


def _shown_tokens(form: AnswerForm, demand: _Demand) -> tuple[str, ...]:
    """The tokens that an engine has to print for an answer to be taken apart."""
    tokens = form.marks.shown_tokens
    if demand.tools and form.calls is not None:
        tokens += form.calls.shown_tokens
    return tuple(dict.fromkeys(tokens))


def _demand(
    request: ChatRequest, model: DesiredModel, form: AnswerForm, kind: EngineKind
) -> _Demand:
    """Tools and format of the answer. Errors: RequestError for what cannot be had."""
    choice = request.tool_choice
    tools = () if choice == "none" else tuple(request.tools or ())
    must_call = isinstance(choice, NamedTool) or choice == "required"
    if must_call and not tools:
        raise RequestError(
            400, "there are no tools to choose from", code="invalid_value", param="tool_choice"
        )
    if tools:
        _refuse_tools(model, form, kind, must_call=must_call)

    arguments = "arguments" if form.calls is None else form.calls.arguments_key
    if isinstance(choice, NamedTool):
        schema = _chosen_tool(choice, tools).call_schema(arguments)
        return _Demand(tools=tools, schema=schema, is_call=True)
    if choice == "required":
        calls = [tool.call_schema(arguments, f"#/anyOf/{at}") for at, tool in enumerate(tools)]
        return _Demand(tools=tools, schema={"anyOf": calls}, is_call=True)

    wanted = request.response_format
    if isinstance(wanted, JsonObject | JsonSchema) and tools:
        raise RequestError(
            400,
            "tools and a JSON response_format cannot be combined",
            code="unsupported_parameter",
            param="response_format",
            hint="leave one of tools and response_format out",
        )
    if isinstance(wanted, JsonObject):
        return _Demand(schema=_ANY_OBJECT)
    if isinstance(wanted, JsonSchema):
        return _Demand(schema=wanted.json_schema.schema_)
    return _Demand(tools=tools)


def _refuse_tools(
    model: DesiredModel, form: AnswerForm, kind: EngineKind, *, must_call: bool
) -> None:
    """Errors: RequestError if calls would not come back as calls."""
    if form.calls is None:
        raise RequestError(
            400,
            f"the chat template of {model.name!r} {form.why}",
            code="unsupported_parameter",
            param="tools",
            hint="leave tools out, or name a chat_template that knows them, "
            "such as chatml or llama3",
        )

    # A call that must come is demanded as plain JSON, in which no control token stands.
    if form.calls.control and not must_call and not ENGINES[kind].prints_control_tokens:
        raise RequestError(
            400,
            f"the model {model.name!r} writes calls with control tokens ({form.calls.name}), "
            f"which the engine {kind} does not print",
            code="unsupported_parameter",
            param="tools",
            hint="leave tools out, or demand a call with tool_choice: required",
        )


def _chosen_tool(choice: NamedTool, tools: Sequence[Tool]) -> Tool:
    """Errors: RequestError for a tool that the request does not have."""
    known = {tool.function.name: tool for tool in tools}
    name = choice.function.name
    if name not in known:
        raise RequestError(
            400,
            f"there is no tool {name!r}",
            code="invalid_value",
            param="tool_choice",
            hint=f"one of {', '.join(known)}",
        )
    return known[name]


def _nul(param: str) -> RequestError:
    return RequestError(
        400,
        "the text has a NUL character",
        code="invalid_value",
        param=param,
        hint="remove it: many runtimes stop reading there",
    )
