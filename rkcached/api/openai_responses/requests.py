"""Records of requests to OpenAI's Responses, and their translation to our own. Pure.

The interface keeps nothing: what refers to an earlier response or a stored conversation is refused,
with the next step. What is about OpenAI's own service is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)

from rkcached.api.requests import ChatRequest, JsonObject, PlainText
from rkcached.messages.bounds import ArgumentsBudget
from rkcached.messages.record import NOT_EMPTY, ForeignFields, Many, Name, Record, of_types
from rkcached.messages.tools import MAX_TOOLS, ToolName

_INT32 = 2**31

_EFFORTS = {"max": "xhigh"}
"""The names of efforts that templates know by another."""

_PARTS = ("input_text", "output_text", "text", "refusal")
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


class TextContent(ForeignFields):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Any = Field(default=None, description="Ignored.")
    logprobs: Any = Field(default=None, description="Ignored.")
    prompt_cache_breakpoint: Any = Field(default=None, description="Ignored.")

    @property
    def words(self) -> str:
        return self.text


class RefusalContent(ForeignFields):
    type: Literal["refusal"]
    refusal: str

    @property
    def words(self) -> str:
        return self.refusal


Content = Annotated[TextContent | RefusalContent, Field(discriminator="type"), of_types(*_PARTS)]


class _Item(ForeignFields):
    id: Any = Field(default=None, description="Ignored.")
    status: Any = Field(default=None, description="Ignored.")


class MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[Many[Content], NOT_EMPTY]
    phase: Any = Field(default=None, description="Ignored.")


class FunctionCallItem(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    caller: Any = Field(default=None, description="Ignored.")
    namespace: Any = Field(default=None, description="Ignored.")

    @field_validator("arguments")
    @classmethod
    def _is_within_the_budget(cls, arguments: str, info: ValidationInfo) -> str:
        if isinstance(info.context, ArgumentsBudget):
            info.context.spend(arguments)
        return arguments

    def plain(self) -> dict[str, Any]:
        """The call as OpenAI's older interface has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


class FunctionCallOutputItem(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Many[Content]
    name: Any = Field(default=None, description="Ignored.")
    caller: Any = Field(default=None, description="Ignored.")
    namespace: Any = Field(default=None, description="Ignored.")


class ReasoningText(ForeignFields):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(_Item):
    type: Literal["reasoning"]
    content: Many[ReasoningText] | None = Field(
        default=None, description="Shown to the model where its chat template does so."
    )
    summary: Any = Field(default=None, description="Ignored.")
    encrypted_content: Any = Field(default=None, description="Ignored.")


def _is_whole(item: Any) -> Any:
    if isinstance(item, dict) and item.get("type") == "item_reference":
        raise ValueError(
            "rkcached keeps no items; send the item itself instead of an item_reference, as "
            "clients do with store: false"
        )
    return item


def _kind(item: Any) -> Any:
    """A message may come without its type."""
    if isinstance(item, dict):
        return item.get("type", "message")
    return getattr(item, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
    of_types(*_ITEMS),
    BeforeValidator(_is_whole),  # comes first: Pydantic calls the last one first
]


class FunctionTool(ForeignFields):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        default=None, description="JSON schema of the arguments."
    )
    strict: bool | None = Field(default=None, description="Ignored.")
    allowed_callers: Any = Field(default=None, description="Ignored.")
    defer_loading: Any = Field(default=None, description="Ignored.")
    output_schema: Any = Field(default=None, description="Ignored.")

    def plain(self) -> dict[str, Any]:
        """The tool as OpenAI's older interface has it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = self.parameters
        return {"type": "function", "function": function}


class FunctionChoice(Record):
    type: Literal["function"]
    name: Name


class SchemaFormat(Record):
    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(
        default=None, description="No effect: an answer always follows the schema."
    )


class TextConfig(Record):
    format: Annotated[PlainText | JsonObject | SchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    verbosity: Any = Field(default=None, description="Ignored.")


class ReasoningConfig(Record):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="The variable reasoning_effort of the chat template."
    )
    summary: Any = Field(default=None, description="Ignored.")
    generate_summary: Any = Field(default=None, description="Ignored.")
    context: Any = Field(default=None, description="Ignored.")
    mode: Any = Field(default=None, description="Ignored.")


def _is_kept(value: object) -> object:
    if value is not None:
        raise ValueError(
            "rkcached keeps no responses and no conversations; send all items of the conversation "
            "in input"
        )
    return value


_KeptElsewhere = Annotated[None, BeforeValidator(_is_kept)]


class ResponsesRequest(Record):
    """`POST /v1/responses`."""

    model: Name = Field(description="A model, or `model/prompt`.")
    input: str | Annotated[Many[Item], NOT_EMPTY]
    instructions: str | None = None
    tools: (
        Annotated[Many[Annotated[FunctionTool, of_types("function")]], Field(max_length=MAX_TOOLS)]
        | None
    ) = None
    tool_choice: (
        Literal["none", "auto", "required"] | Annotated[FunctionChoice, of_types("function")] | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=_INT32)
    temperature: float | None = Field(default=None, ge=0, le=5)
    top_p: float | None = Field(default=None, gt=0, le=1)
    reasoning: ReasoningConfig | None = None
    stream: bool | None = None
    truncation: Literal["disabled"] | None = Field(
        default=None, description="Nothing is left out of a request that is too long."
    )
    background: Literal[False] | None = None
    previous_response_id: _KeptElsewhere = None
    conversation: _KeptElsewhere = None
    include: Annotated[Many[str], Field(max_length=32)] | None = Field(
        default=None, description="No effect; `message.output_text.logprobs` is rejected."
    )
    store: Any = Field(default=None, description="Ignored: nothing is kept.")
    metadata: Any = Field(default=None, description="Ignored.")
    user: Any = Field(default=None, description="Ignored.")
    service_tier: Any = Field(default=None, description="Ignored.")
    safety_identifier: Any = Field(default=None, description="Ignored.")
    prompt_cache_key: Any = Field(default=None, description="Ignored.")
    prompt_cache_options: Any = Field(default=None, description="Ignored.")
    prompt_cache_retention: Any = Field(default=None, description="Ignored.")
    max_tool_calls: Any = Field(default=None, description="Ignored: no tool runs here.")
    stream_options: Any = Field(default=None, description="Ignored.")

    @field_validator("input")
    @classmethod
    def _asks_something(cls, items: str | list[Any]) -> str | list[Any]:
        if isinstance(items, list) and all(isinstance(item, ReasoningItem) for item in items):
            raise ValueError("it should have an item other than reasoning")
        return items

    @field_validator("include")
    @classmethod
    def _is_had(cls, include: list[str] | None) -> list[str] | None:
        if "message.output_text.logprobs" in (include or ()):
            raise ValueError("logprobs are answered by /v1/chat/completions only")
        return include

    def translated(self) -> ChatRequest:
        """The request as it is inside."""
        wanted: dict[str, Any] = {
            "model": self.model,
            "messages": list(self._messages()),
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "parallel_tool_calls": self.parallel_tool_calls,
        }
        if self.tools:
            wanted["tools"] = [tool.plain() for tool in self.tools]
        if isinstance(self.tool_choice, FunctionChoice):
            function = {"name": self.tool_choice.name}
            wanted["tool_choice"] = {"type": "function", "function": function}
        else:
            wanted["tool_choice"] = self.tool_choice

        effort = self.reasoning.effort if self.reasoning is not None else None
        if effort is not None:
            wanted["reasoning_effort"] = _EFFORTS.get(effort, effort)
        if self.text is not None and self.text.format is not None:
            wanted["response_format"] = _format(self.text.format)
        return ChatRequest.model_validate(wanted)

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.instructions:
            yield {"role": "system", "content": self.instructions}
        if isinstance(self.input, str):
            yield {"role": "user", "content": self.input}
        else:
            yield from _conversation(self.input)


def _conversation(items: list[Any]) -> Iterator[dict[str, Any]]:
    """The messages of these items: reasoning, a text and calls in a row are one answer."""
    answer: dict[str, Any] = {}
    for item in items:
        is_text = isinstance(item, MessageItem)
        is_result = isinstance(item, FunctionCallOutputItem)
        is_of_answer = not is_result and not (is_text and item.role != "assistant")
        begins_another = isinstance(item, ReasoningItem) or (is_text and is_of_answer)
        is_over = not is_of_answer or (
            begins_another and ("content" in answer or "calls" in answer)
        )
        if is_over and answer:
            yield from _answer(answer)
            answer = {}

        match item:
            case MessageItem() if is_of_answer:
                answer["content"] = _texts(item.content)
            case MessageItem():
                yield {"role": item.role, "content": _texts(item.content)}
            case FunctionCallItem():
                answer.setdefault("calls", []).append(item.plain())
            case FunctionCallOutputItem():
                content = _texts(item.output)
                yield {"role": "tool", "tool_call_id": item.call_id, "content": content}
            case ReasoningItem():
                texts = [part.text for part in item.content or ()]
                answer.setdefault("reasoning", []).extend(texts)
    yield from _answer(answer)


def _answer(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "content" not in answer and "calls" not in answer:
        return  # reasoning alone is no answer

    message: dict[str, Any] = {"role": "assistant", "content": answer.get("content")}
    if "calls" in answer:
        message["tool_calls"] = answer["calls"]
    if answer.get("reasoning"):
        message["reasoning_content"] = "\n".join(answer["reasoning"])
    yield message


def _texts(content: str | list[Any]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.words} for part in content]


def _format(wanted: PlainText | JsonObject | SchemaFormat) -> dict[str, Any]:
    if isinstance(wanted, SchemaFormat):
        named = {"name": wanted.name, "schema": wanted.schema_}
        return {"type": "json_schema", "json_schema": named}
    return {"type": wanted.type}
