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
from typing import Any

from rkcached import errors
from rkcached.api.conversation import (
    Conversation,
    exhausted,
    template_refused,
    text_arguments_refused,
    tools_refused,
)
from rkcached.api.named_prompt import named_prompt, with_prompt
from rkcached.api.rendering import RenderThread
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
from rkcached.messages.reasoning import Marks
from rkcached.messages.reply import Reply
from rkcached.messages.template import ChatTemplate
from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.snapshot import Published
from rkcached.serving.embeddings import EmbeddingInput
from rkcached.serving.failures import as_request_error
from rkcached.serving.job import Job
from rkcached.serving.models import find_embedding_model, find_text_model
from rkcached.worker.schemas import MAX_SCHEMA_BYTES, SchemaChecker

_ANY_OBJECT = {"type": "object"}


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
        self._render_thread = RenderThread()
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
        form = await self._answer_form(model.template, with_tools=bool(_tools(request)))
        demand = _demand(request, model, form, snapshot.manifest.engine.kind)
        named, param = named_prompt(request)

        messages = [message.plain() for message in request.messages]
        if named is not None:
            messages = with_prompt(snapshot, named, messages, param)

        conversation = Conversation(
            template=model.template_for(named.prompt if named else None),
            sent=request.messages,
            messages=messages,
            tools=[tool.plain() for tool in demand.tools],
            variables=request.variables(),
        )
        prompt, continued = await self._prompt(conversation, request, demand)
        if "\0" in prompt:
            raise _nul("messages")

        declared = model.config.sampling(named.prompt if named else None)
        values: dict[str, Any] = declared | request.sampling()
        correct = None
        if demand.schema is None:
            values["shown_tokens"] = _shown_tokens(form, demand)
        else:
            values["json_schema"] = await self._checked(demand)
            correct = self._second_try(conversation, values["json_schema"])

        job = Job(
            model=model,
            named=named,
            prompt=prompt,
            sampling=Sampling(**values),
            cold=request.wanted_cache is False,
            accepted=accepted,
            with_tools=bool(demand.tools),
            variables=tuple(conversation.variables),
            schema_param=demand.schema_param,
            correct=correct,
        )
        reply = Reply(
            form=form.calls if demand.tools else None,
            tools={tool.function.name: tool.arguments_schema for tool in demand.tools},
            marks=form.marks,
            forced=demand.is_call,
            reasons=_reasons(form.marks, prompt, continued) and demand.schema is None,
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

    async def _prompt(
        self, conversation: Conversation, request: ChatRequest, demand: _Demand
    ) -> tuple[str, str]:
        """The rendered request, and the text that the answer continues, if any.

        Errors: RequestError.
        """
        if request.must_continue and demand.schema is not None:
            raise RequestError(
                400,
                f"an answer that continues a message cannot be bound by {demand.schema_param}",
                code="unsupported_parameter",
                param="continue_final_message",
                hint=f"leave out {demand.schema_param}, or continue_final_message and "
                "add_generation_prompt",
            )
        if request.continues and demand.schema is None:
            last = conversation.messages[-1]["content"]
            try:
                if last.strip():
                    return await self._write(conversation, continue_final=True), last
                conversation = conversation.without_last()
            except errors.TemplateError as error:
                # Who did not ask for it gets an answer of its own.
                if request.must_continue or isinstance(error, errors.TemplateExhausted):
                    raise await self._refusal(error, conversation, continue_final=True) from error

        try:
            return await self._write(conversation), ""
        except errors.TemplateError as error:
            raise await self._refusal(error, conversation) from error

    async def _answer_form(self, template: ChatTemplate, *, with_tools: bool) -> AnswerForm:
        """How the answer is written. The template is tried for tools only. Errors: RequestError."""
        if not with_tools:
            return AnswerForm(marks=template.marks)
        try:
            return await self._render_thread.do(template, lambda: template.answer)
        except errors.TemplateExhausted as error:
            raise exhausted(error) from error

    async def _write(self, conversation: Conversation, *, continue_final: bool = False) -> str:
        """Errors: TemplateError."""
        render = functools.partial(conversation.render, continue_final=continue_final)
        return await self._render_thread.do(conversation.template, render)

    async def _refusal(
        self, error: errors.TemplateError, conversation: Conversation, continue_final: bool = False
    ) -> RequestError:
        """The answer to a request that its template cannot render, and why."""
        if isinstance(error, errors.TemplateExhausted):
            return exhausted(error)

        repaired = conversation.with_objects()
        if repaired is not None and await self._can_write(repaired, continue_final):
            return text_arguments_refused(error, conversation.sent)

        bare = conversation.without_tools()
        if bare is not None and await self._can_write(bare, continue_final):
            return tools_refused(error)
        return template_refused(error, conversation.sent)

    async def _can_write(self, conversation: Conversation, continue_final: bool) -> bool:
        try:
            await self._write(conversation, continue_final=continue_final)
        except errors.TemplateError:
            return False
        return True

    def _second_try(
        self, conversation: Conversation, schema: str
    ) -> Callable[[str, str], Awaitable[str]]:
        """Renders the conversation with the answer that does not fit, and with the reason."""

        async def correct(answer: str, why: str) -> str:
            order = f"Answer with nothing but JSON that fits this JSON schema: {schema}"
            more = [
                Message(role="assistant", content=answer),
                Message(role="user", content=f"{why}. {order}"),
            ]
            try:
                return await self._write(conversation.with_more(more))
            except errors.TemplateError as error:
                raise await self._refusal(error, conversation) from error

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
    tools = _tools(request)
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


def _tools(request: ChatRequest) -> tuple[Tool, ...]:
    """The tools that the model is shown."""
    return () if request.tool_choice == "none" else tuple(request.tools or ())


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


def _reasons(marks: Marks, prompt: str, continued: str) -> bool:
    """Whether the answer begins with reasoning: the prompt, or what it continues, is inside it."""
    if not continued:
        return marks.begun(prompt)
    return max(map(continued.rfind, marks.openings)) > max(map(continued.rfind, marks.closings))


def _nul(param: str) -> RequestError:
    return RequestError(
        400,
        "the text has a NUL character",
        code="invalid_value",
        param=param,
        hint="remove it: many runtimes stop reading there",
    )
