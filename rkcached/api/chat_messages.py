"""Records of the messages of a chat, and the messages that chat templates get of them. Pure.

A conversation comes back as other programs keep it: with their own fields, with parts where a text
would do, and with a call whose arguments some model wrote wrongly. None of that is a reason to
refuse the rest of the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from rkcached.messages.bounds import MAX_DEPTH, ArgumentsBudget, is_deeper
from rkcached.messages.message import Message
from rkcached.messages.record import ForeignFields, Many, of_types


class TextPart(ForeignFields):
    type: Literal["text"]
    text: str


class RefusalPart(ForeignFields):
    """Of an earlier answer of somebody else's."""

    type: Literal["refusal"]
    refusal: str


_REASONING: Final = "reasoning_"

TextParts = Many[Annotated[TextPart, of_types("text")]]
Content = str | Annotated[TextParts, Field(min_length=1)]
AnswerPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class FunctionCall(ForeignFields):
    name: str
    arguments: str | dict[str, Any] | None = Field(
        default=None,
        description="A JSON object, as text or as it is; any other text reaches the template as "
        "it is.",
    )
    parsed_arguments: Any = Field(default=None, description="What OpenAI's clients add; ignored.")

    def parsed(self) -> dict[str, Any] | str:
        """The object, or the text that is not one."""
        if not isinstance(self.arguments, str):
            return self.arguments or {}
        if not self.arguments.strip():
            return {}

        try:
            value = json.loads(self.arguments, parse_constant=_no_constant)
            # Neither half a surrogate pair nor infinity can be written again.
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            return self.arguments
        if not isinstance(value, dict) or is_deeper(value, MAX_DEPTH):
            return self.arguments
        return value


class ToolCallRecord(ForeignFields):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None

    def plain(self) -> dict[str, Any]:
        """The call as chat templates expect it."""
        function = {"name": self.function.name, "arguments": self.function.parsed()}
        return {"id": self.id, "type": "function", "function": function}

    @field_validator("function")
    @classmethod
    def _is_within_the_budget(cls, function: FunctionCall, info: ValidationInfo) -> FunctionCall:
        if isinstance(info.context, ArgumentsBudget) and isinstance(function.arguments, str):
            info.context.spend(function.arguments)
        return function


def _text(content: str | Sequence[TextPart | RefusalPart] | None) -> str:
    """The text of a message. Its parts are lines, as vLLM and llama.cpp have it."""
    if isinstance(content, str):
        return content
    return "\n".join(map(_part_text, content or ()))


def _part_text(part: TextPart | RefusalPart) -> str:
    return part.text if isinstance(part, TextPart) else part.refusal


class _MessageRecord(ForeignFields):
    name: str | None = None
    id: Any = Field(default=None, description="Of the message, where it is kept; ignored.")

    def _plain(self, role: str, content: str) -> Message:
        message = Message(role=role, content=content)
        if self.name is not None:
            message["name"] = self.name
        return message


class SystemMessage(_MessageRecord):
    role: Literal["system", "developer"]
    content: Content

    def plain(self) -> Message:
        """`developer` is another word for `system`."""
        return self._plain("system", _text(self.content))


class UserMessage(_MessageRecord):
    role: Literal["user"]
    content: Content

    def plain(self) -> Message:
        return self._plain("user", _text(self.content))


class ToolMessage(_MessageRecord):
    """The result of a call. That of a tool that returns nothing may be null."""

    role: Literal["tool"]
    content: str | TextParts | None = None
    tool_call_id: str

    def plain(self) -> Message:
        message = self._plain("tool", _text(self.content))
        message["tool_call_id"] = self.tool_call_id
        return message


class AssistantMessage(_MessageRecord):
    """An earlier answer. It may be sent back as it came, from whatever server it came."""

    model_config = ConfigDict(json_schema_extra={"patternProperties": {f"^{_REASONING}": {}}})

    # Reasoning in the words of one server.
    foreign_prefixes = (_REASONING,)

    role: Literal["assistant"]
    content: str | Many[AnswerPart] | None = None
    tool_calls: Many[ToolCallRecord] | None = None
    reasoning_content: Any = Field(default=None, description="The reasoning, if it is a text.")
    reasoning: Any = Field(default=None, description="Another word for it: vLLM's, OpenRouter's.")
    thinking: Any = Field(default=None, description="Another word for it: Ollama's.")
    reasoning_details: Any = Field(default=None, description="OpenRouter's; ignored.")
    thinking_blocks: Any = Field(default=None, description="LiteLLM's; ignored.")
    refusal: str | None = None
    audio: None = None
    function_call: None = None
    created_at: Any = Field(default=None, description="What other servers add; ignored.")
    model: Any = Field(default=None, description="What other servers add; ignored.")
    annotations: Any = Field(default=None, description="What OpenAI's clients add; ignored.")
    parsed: Any = Field(default=None, description="What OpenAI's clients add; ignored.")

    def plain(self) -> Message:
        message = self._plain("assistant", _text(self.content) or self.refusal or "")
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]

        for reasoning in (self.reasoning_content, self.thinking, self.reasoning):
            if isinstance(reasoning, str) and reasoning:
                message["reasoning_content"] = reasoning
                break
        return message


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]
