"""Turns a checked body into a job for serving: model and prompt, rendered text, sampling, schema.

Every refusal is a RequestError with its HTTP status, OpenAI's code and the next thing to do.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rkcached import errors
from rkcached.api.conversation import (
    Conversation,
    exhausted,
    template_refused,
    text_arguments_refused,
    tools_refused,
)
from rkcached.api.demand import ANY_OBJECT, Demand, demand_of, shown_tools
from rkcached.api.named_prompt import named_prompt, with_prompt
from rkcached.api.rendering import RenderThread
from rkcached.api.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from rkcached.engines.base import Sampling
from rkcached.engines.registry import ENGINES
from rkcached.errors import RequestError
from rkcached.messages.detection import AnswerForm
from rkcached.messages.message import Message
from rkcached.messages.reasoning import Marks
from rkcached.messages.reply import Reply
from rkcached.messages.template import ChatTemplate
from rkcached.messages.tools import ToolSet
from rkcached.reconcile.snapshot import Published, Snapshot
from rkcached.serving.embeddings import EmbeddingInput
from rkcached.serving.failures import as_request_error
from rkcached.serving.job import SYSTEM_MESSAGE, Job, Part
from rkcached.serving.models import find_embedding_model, find_text_model
from rkcached.sources.records import Key
from rkcached.worker.schemas import MAX_SCHEMA_BYTES, SchemaChecker


class Preparation:
    def __init__(self, published: Published) -> None:
        self._published = published
        self._render_thread = RenderThread()
        self._schema_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="schema")
        self._schemas = SchemaChecker()

    def close(self) -> None:
        """Stop checking schemas: the requests that wait for a check are refused."""
        self._schemas.kill()

    async def chat(self, request: ChatRequest, accepted: float, owner: int) -> tuple[Job, Reply]:
        """Check a request against what is declared, and render it.

        `accepted` is in monotonic seconds, `owner` the client's uid. Errors: RequestError.
        """
        snapshot = self._published.now
        model = find_text_model(snapshot, request.model.partition("/")[0])
        named, param = named_prompt(request)
        if named is not None:
            snapshot = snapshot.seen_by(owner)
        shown = shown_tools(request, _declared_tools(snapshot, named))
        form = await self._answer_form(model.template, with_tools=bool(shown.tools))
        demand = demand_of(request, shown, model, form, snapshot.manifest.engine.kind)

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
            owner=owner,
            parts=tuple(map(_part, messages)),
            goes_on=any(message["role"] == "assistant" for message in messages),
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

    def completion(self, request: CompletionRequest, accepted: float, owner: int) -> Job:
        """Check a request whose text goes to the model as it is.

        `accepted` is in monotonic seconds, `owner` the client's uid. Errors: RequestError.
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
            owner=owner,
            parts=(Part("the prompt", request.text),),
        )

    def embedding(self, request: EmbeddingRequest) -> tuple[str, list[EmbeddingInput]]:
        """The name of the model and the inputs. Errors: RequestError."""
        model = find_embedding_model(self._published.now, request.model)
        inputs = list(request.each())
        if any(isinstance(content, str) and "\0" in content for content in inputs):
            raise _nul("input")
        return model.name, inputs

    async def _prompt(
        self, conversation: Conversation, request: ChatRequest, demand: Demand
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

    async def _checked(self, demand: Demand) -> str:
        """The schema as text, once a run can be held to it. Errors: RequestError."""
        text = json.dumps(demand.schema)
        if demand.schema == ANY_OBJECT:
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


def _declared_tools(snapshot: Snapshot, named: Key | None) -> ToolSet | None:
    """The tools that belong to the prompt, as its text does."""
    if named is None:
        return None
    prompt = snapshot.desired.prompts.get(named)
    return None if prompt is None else prompt.tools


_PART_NAMES = {
    "system": SYSTEM_MESSAGE,
    "user": "a message of the user",
    "assistant": "an answer of the assistant",
    "tool": "the result of a tool",
}


def _part(message: Message) -> Part:
    role = message["role"]
    return Part(_PART_NAMES.get(role, f"a message of {role}"), message["content"])


def _shown_tokens(form: AnswerForm, demand: Demand) -> tuple[str, ...]:
    """The tokens that an engine has to print for an answer to be taken apart."""
    tokens = form.marks.shown_tokens
    if demand.tools and form.calls is not None:
        tokens += form.calls.shown_tokens
    return tuple(dict.fromkeys(tokens))


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
