"""Records of Anthropic's requests, and their translation to our own. Pure.

Blocks and parameters that would change the answer in a way that no model here can follow are
refused by name. Those that are hints, or about Anthropic's service, are accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from rkcached.api.requests import ChatRequest
from rkcached.messages.record import NOT_EMPTY, ForeignFields, Many, Name, Record, of_types
from rkcached.messages.tools import MAX_TOOLS, ToolName

_INT32 = 2**31

_EFFORTS = {"max": "xhigh"}
"""The names of efforts that templates know by another."""


class TextBlock(ForeignFields):
    type: Literal["text"]
    text: str
    citations: Any = Field(default=None, description="Ignored.")


class ToolUseBlock(ForeignFields):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = Field(default=None, description="Ignored.")
    toolset_name: Any = Field(default=None, description="Ignored.")


class ToolResultBlock(ForeignFields):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Many[Annotated[TextBlock, of_types("text")]] | None = None
    is_error: bool | None = Field(
        default=None, description="Ignored: the model reads the content only."
    )
    toolset_name: Any = Field(default=None, description="Ignored.")


class ThinkingBlock(ForeignFields):
    type: Literal["thinking"]
    thinking: str = Field(description="Shown to the model where its chat template does so.")
    signature: Any = Field(default=None, description="Ignored.")


class RedactedThinkingBlock(ForeignFields):
    """Of an earlier answer of Anthropic's; it is dropped."""

    type: Literal["redacted_thinking"]
    data: Any = None


UserBlock = Annotated[
    TextBlock | ToolResultBlock, Field(discriminator="type"), of_types("text", "tool_result")
]
AssistantBlock = Annotated[
    TextBlock | ToolUseBlock | ThinkingBlock | RedactedThinkingBlock,
    Field(discriminator="type"),
    of_types("text", "tool_use", "thinking", "redacted_thinking"),
]
Texts = str | Many[Annotated[TextBlock, of_types("text")]]


class UserTurn(Record):
    role: Literal["user"]
    content: str | Annotated[Many[UserBlock], NOT_EMPTY]

    def messages(self) -> Iterator[dict[str, Any]]:
        """OpenAI has a message for each result of a tool, and one for what stands between."""
        if isinstance(self.content, str):
            yield {"role": "user", "content": self.content}
            return

        texts: list[dict[str, Any]] = []
        for block in self.content:
            if isinstance(block, TextBlock):
                texts.append(_part(block))
                continue

            if texts:
                yield {"role": "user", "content": texts}
                texts = []
            content = block.content
            yield {
                "role": "tool",
                "tool_call_id": block.tool_use_id,
                "content": list(map(_part, content)) if isinstance(content, list) else content,
            }
        if texts:
            yield {"role": "user", "content": texts}


class AssistantTurn(Record):
    role: Literal["assistant"]
    content: str | Many[AssistantBlock]

    def messages(self) -> Iterator[dict[str, Any]]:
        if isinstance(self.content, str):
            yield {"role": "assistant", "content": self.content}
            return

        texts: list[dict[str, Any]] = []
        calls: list[dict[str, Any]] = []
        reasoning: list[str] = []
        for block in self.content:
            match block:
                case TextBlock():
                    texts.append(_part(block))
                case ToolUseBlock():
                    function = {"name": block.name, "arguments": block.input}
                    calls.append({"id": block.id, "type": "function", "function": function})
                case ThinkingBlock():
                    reasoning.append(block.thinking)

        message: dict[str, Any] = {"role": "assistant", "content": texts}
        if calls:
            message["tool_calls"] = calls
        if reasoning:
            message["reasoning_content"] = "\n".join(reasoning)
        yield message


class SystemTurn(Record):
    role: Literal["system"]
    content: str | Annotated[Many[Annotated[TextBlock, of_types("text")]], NOT_EMPTY]

    def messages(self) -> Iterator[dict[str, Any]]:
        yield _system(self.content)


Turn = Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")]


class ToolDefinition(ForeignFields):
    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any] = Field(description="JSON schema of the arguments.")
    strict: Any = Field(default=None, description="Ignored.")
    input_examples: Any = Field(default=None, description="Ignored.")
    allowed_callers: Any = Field(default=None, description="Ignored.")
    defer_loading: Any = Field(default=None, description="Ignored.")
    eager_input_streaming: Any = Field(default=None, description="Ignored.")

    def plain(self) -> dict[str, Any]:
        """The tool as OpenAI has it."""
        function: dict[str, Any] = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


class AnyToolChoice(Record):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None

    def plain(self) -> str:
        return "required" if self.type == "any" else self.type


class NamedToolChoice(Record):
    type: Literal["tool"]
    name: Name
    disable_parallel_tool_use: bool | None = None

    def plain(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name}}


class ThinkingConfig(Record):
    type: Literal["enabled", "adaptive", "disabled"] = Field(
        description="The variable enable_thinking of the chat template, where it has one."
    )
    budget_tokens: int | None = Field(
        default=None, description="Ignored: reasoning counts towards max_tokens only."
    )
    display: Any = Field(default=None, description="Ignored.")


class JsonFormat(Record):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Record):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="The variable reasoning_effort of the chat template."
    )
    format: JsonFormat | None = None


class MessagesRequest(Record):
    """`POST /v1/messages`."""

    model: Name = Field(description="A model, or `model/prompt`.")
    messages: Annotated[Many[Turn], NOT_EMPTY]
    max_tokens: int = Field(ge=1, lt=_INT32)
    system: Texts | None = None
    tools: (
        Annotated[Many[Annotated[ToolDefinition, of_types("custom")]], Field(max_length=MAX_TOOLS)]
        | None
    ) = None
    tool_choice: Annotated[AnyToolChoice | NamedToolChoice, Field(discriminator="type")] | None = (
        None
    )
    stop_sequences: Annotated[Many[str], Field(max_length=4)] | None = None
    temperature: float | None = Field(default=None, ge=0, le=5)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=100_000)
    stream: bool | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = Field(default=None, description="A hint; ignored.")
    context_management: Any = Field(default=None, description="Ignored.")
    metadata: Any = Field(default=None, description="Ignored.")
    service_tier: Any = Field(default=None, description="Ignored.")
    diagnostics: Any = Field(default=None, description="Ignored.")
    inference_geo: Any = Field(default=None, description="Ignored.")
    speed: Any = Field(default=None, description="Ignored.")
    user_profile_id: Any = Field(default=None, description="Ignored.")
    workspace_id: Any = Field(default=None, description="Ignored.")

    @property
    def one_call(self) -> bool:
        """Whether the answer may have one tool call at most."""
        return bool(self.tool_choice and self.tool_choice.disable_parallel_tool_use)

    def translated(self) -> ChatRequest:
        """The request as it is inside."""
        wanted: dict[str, Any] = {
            "model": self.model,
            "messages": list(self._messages()),
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stream": self.stream,
            "parallel_tool_calls": not self.one_call,
        }
        if self.tools:
            wanted["tools"] = [tool.plain() for tool in self.tools]
        if self.tool_choice is not None:
            wanted["tool_choice"] = self.tool_choice.plain()
        if self.thinking is not None:
            wanted["enable_thinking"] = self.thinking.type != "disabled"
        return ChatRequest.model_validate(wanted | self._output())

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.system:
            yield _system(self.system)
        for turn in self.messages:
            yield from turn.messages()

    def _output(self) -> dict[str, Any]:
        wanted: dict[str, Any] = {}
        config = self.output_config
        if config is not None and config.effort is not None:
            wanted["reasoning_effort"] = _EFFORTS.get(config.effort, config.effort)
        if config is not None and config.format is not None:
            named = {"name": "answer", "schema": config.format.schema_}
            wanted["response_format"] = {"type": "json_schema", "json_schema": named}
        return wanted


def _system(content: Texts) -> dict[str, Any]:
    if isinstance(content, list):
        return {"role": "system", "content": list(map(_part, content))}
    return {"role": "system", "content": content}


def _part(block: TextBlock) -> dict[str, Any]:
    return {"type": "text", "text": block.text}
