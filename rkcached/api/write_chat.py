"""Writes the text of a chat request: its messages, tools and prompt, in the model's template. Pure.

Nothing here needs the event loop, and large requests are written in a thread.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rkcached import errors
from rkcached.api.conversation import (
    Conversation,
    exhausted,
    template_refused,
    text_arguments_refused,
    tools_refused,
)
from rkcached.api.demand import Demand, demand_of, shown_tools
from rkcached.api.named_prompt import with_prompt
from rkcached.api.requests import ChatRequest
from rkcached.errors import RequestError
from rkcached.messages.detection import AnswerForm
from rkcached.messages.message import Message
from rkcached.messages.template import ChatTemplate
from rkcached.messages.tools import ToolSet
from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.snapshot import Snapshot
from rkcached.serving.job import SYSTEM_MESSAGE, Part
from rkcached.sources.records import Key

MAX_TOKEN_BYTES = 256
"""More than the longest tokens have: runs of 128 blanks in many vocabularies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenChat:
    """A chat request as the model reads it."""

    form: AnswerForm
    """How the answer will be written."""
    demand: Demand
    schema: str
    """The JSON schema that the answer must fit; empty if there is none."""
    conversation: Conversation
    prompt: str
    """The rendered request."""
    continued: str
    """The text that the answer continues, if any."""
    ignored: tuple[str, ...]
    """The parts of the request that were left out for those of the prompt, or the other way."""

    @property
    def messages(self) -> Sequence[Message]:
        return self.conversation.messages

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(map(_part, self.messages))


def write_chat(
    request: ChatRequest,
    snapshot: Snapshot,
    model: DesiredModel,
    named: Key | None,
    param: str,
) -> WrittenChat:
    """`named`: the prompt that the request names by the parameter `param`. Errors: RequestError."""
    shown = shown_tools(request, _declared_tools(snapshot, named))
    form = _answer_form(model.template, with_tools=bool(shown.tools))
    demand = demand_of(request, shown, model, form, snapshot.manifest.engine.kind)

    messages = [message.plain() for message in request.messages]
    ignored: tuple[str, ...] = ()
    if named is not None:
        messages, ignored = with_prompt(snapshot, named, messages, param)
    size_bytes = sum(len(message["content"].encode()) for message in messages)
    refuse_too_long(model, size_bytes, "messages")

    conversation = Conversation(
        template=model.template_for(named.prompt if named else None),
        sent=request.messages,
        messages=messages,
        tools=[tool.plain() for tool in demand.tools],
        variables=request.variables(),
    )
    prompt, continued = _prompt(conversation, request, demand)
    refuse_too_long(model, len(prompt.encode()), "messages")
    if "\0" in prompt:
        raise nul_refused("messages")
    return WrittenChat(
        form=form,
        demand=demand,
        schema="" if demand.schema is None else json.dumps(demand.schema),
        conversation=conversation,
        prompt=prompt,
        continued=continued,
        ignored=ignored,
    )


def write_again(conversation: Conversation, schema: str, answer: str, why: str) -> str:
    """The conversation with an answer that does not fit the schema, and with the reason.

    Errors: RequestError.
    """
    order = f"Answer with nothing but JSON that fits this JSON schema: {schema}"
    more = [
        Message(role="assistant", content=answer),
        Message(role="user", content=f"{why}. {order}"),
    ]
    try:
        return conversation.with_more(more).render()
    except errors.TemplateError as error:
        raise _refusal(error, conversation) from error


def _prompt(conversation: Conversation, request: ChatRequest, demand: Demand) -> tuple[str, str]:
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
                return conversation.render(continue_final=True), last
            conversation = conversation.without_last()
        except errors.TemplateError as error:
            # Who did not ask for it gets an answer of its own.
            if request.must_continue or isinstance(error, errors.TemplateExhausted):
                raise _refusal(error, conversation, continue_final=True) from error

    try:
        return conversation.render(), ""
    except errors.TemplateError as error:
        raise _refusal(error, conversation) from error


def _answer_form(template: ChatTemplate, *, with_tools: bool) -> AnswerForm:
    """How the answer is written. The template is tried for tools only. Errors: RequestError."""
    if not with_tools:
        return AnswerForm(marks=template.marks)
    try:
        return template.answer
    except errors.TemplateExhausted as error:
        raise exhausted(error) from error


def _refusal(
    error: errors.TemplateError, conversation: Conversation, *, continue_final: bool = False
) -> RequestError:
    """The answer to a request that its template cannot render, and why."""
    if isinstance(error, errors.TemplateExhausted):
        return exhausted(error)

    repaired = conversation.with_objects()
    if repaired is not None and _can_write(repaired, continue_final=continue_final):
        return text_arguments_refused(error, conversation.sent)

    bare = conversation.without_tools()
    if bare is not None and _can_write(bare, continue_final=continue_final):
        return tools_refused(error)
    return template_refused(error, conversation.sent)


def _can_write(conversation: Conversation, *, continue_final: bool) -> bool:
    try:
        conversation.render(continue_final=continue_final)
    except errors.TemplateError:
        return False
    return True


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


def refuse_too_long(model: DesiredModel, size_bytes: int, param: str) -> None:
    """Refuse at once what cannot fit the context: to count its tokens would keep others waiting.

    Errors: RequestError.
    """
    limit = model.config.params.max_context_len
    if size_bytes <= limit * MAX_TOKEN_BYTES:
        return
    raise RequestError(
        400,
        f"the text has {size_bytes:,} bytes, far more than a context of {limit} tokens holds",
        code="context_length_exceeded",
        param=param,
        hint=errors.ContextExceeded(limit, limit).remedy(param),
    )


def nul_refused(param: str) -> RequestError:
    return RequestError(
        400,
        "the text has a NUL character",
        code="invalid_value",
        param=param,
        hint="remove it: many runtimes stop reading there",
    )
