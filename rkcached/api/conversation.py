"""A conversation ready to be rendered, and the words for what its template refuses. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rkcached import errors
from rkcached.api.chat_messages import AssistantMessage, ChatMessage, UserMessage
from rkcached.errors import RequestError
from rkcached.messages.message import Message
from rkcached.messages.template import ChatTemplate


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """All that a chat template is given by one request."""

    template: ChatTemplate
    sent: Sequence[ChatMessage]
    """The messages as the client sent them: errors name their places."""
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any]

    def render(self, *, continue_final: bool = False) -> str:
        """The text. Errors: TemplateError."""
        return self.template.render(
            self.messages, self.tools, variables=self.variables, continue_final=continue_final
        )

    def with_more(self, messages: Sequence[Message]) -> Conversation:
        return replace(self, messages=[*self.messages, *messages])

    def without_last(self) -> Conversation:
        return replace(self, messages=self.messages[:-1])

    def without_tools(self) -> Conversation | None:
        """None if there are none."""
        return replace(self, tools=()) if self.tools else None

    def with_objects(self) -> Conversation | None:
        """The conversation with empty arguments where a call's are not an object.

        None if there is no such call.
        """
        messages = list(map(_with_objects, self.messages))
        if messages == self.messages:
            return None
        return replace(self, messages=messages)


def _with_objects(message: Message) -> Message:
    if "tool_calls" not in message:
        return message

    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        if isinstance(function["arguments"], str):
            function = function | {"arguments": {}}
        calls.append(call | {"function": function})
    return Message(**{**message, "tool_calls": calls})


def exhausted(error: errors.TemplateExhausted) -> RequestError:
    return RequestError(503, error.message, code="template_exhausted", hint=error.hint)


def text_arguments_refused(
    error: errors.TemplateError, messages: Sequence[ChatMessage]
) -> RequestError:
    """The template takes only objects as arguments, and an earlier call has a text."""
    place, call_id, name = next(_text_arguments(messages))
    return RequestError(
        400,
        f"{error.message} (the arguments of the call {call_id!r} of {name!r} are not a JSON "
        "object, and this template can show nothing else)",
        code="template_error",
        param=place,
        hint="correct these arguments, or leave the call and its result out",
    )


def _text_arguments(messages: Sequence[ChatMessage]) -> Iterator[tuple[str, str, str]]:
    """The place, id and function of each call whose arguments are not an object."""
    for at, message in enumerate(messages):
        if not isinstance(message, AssistantMessage):
            continue
        for number, call in enumerate(message.tool_calls or ()):
            if isinstance(call.function.parsed(), str):
                place = f"messages.{at}.tool_calls.{number}.function.arguments"
                yield place, call.id, call.function.name


def tools_refused(error: errors.TemplateError) -> RequestError:
    """The template takes the same conversation without tools."""
    return RequestError(
        400,
        f"{error.message} (the chat template takes these messages, but not with these tools)",
        code="template_error",
        param="tools",
        hint="state the type and the description of each parameter of the tools, or leave them out "
        '(tool_choice: "none" leaves out those that a prompt declares, too)',
    )


def template_refused(error: errors.TemplateError, messages: Sequence[ChatMessage]) -> RequestError:
    hint = error.hint
    at = _out_of_turn(messages)
    if "altern" in error.message and at is not None:
        hint = f"at messages.{at} user and assistant stop taking turns; {hint}"
    return RequestError(400, error.message, code="template_error", param="messages", hint=hint)


def _out_of_turn(messages: Sequence[ChatMessage]) -> int | None:
    """The first message of the user's or assistant's that does not follow one of the other's."""
    of_user = True
    for at, message in enumerate(messages):
        called = isinstance(message, AssistantMessage) and message.tool_calls
        if called or not isinstance(message, UserMessage | AssistantMessage):
            continue
        if isinstance(message, UserMessage) is not of_user:
            return at
        of_user = not of_user

    return None
