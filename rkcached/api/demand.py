"""The demands of a chat request on its answer: tools, a call, or JSON by a schema. Pure.

Every refusal is a RequestError with OpenAI's code and the next thing to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rkcached.api.requests import ChatRequest, JsonObject, JsonSchema, NamedTool
from rkcached.engines.kinds import EngineKind
from rkcached.engines.registry import ENGINES
from rkcached.errors import RequestError
from rkcached.messages.detection import AnswerForm
from rkcached.messages.tools import Tool, ToolSet
from rkcached.plan.desired import DesiredModel
from rkcached.worker.schema_tree import relocated

ANY_OBJECT: Final = {"type": "object"}

_OF_A_DOCUMENT: Final = ("$id", "$schema")
"""The keywords of a schema that stands alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTools:
    """The tools that the model is shown, and whose they are."""

    tools: tuple[Tool, ...] = ()
    declared: bool = False
    """The prompt's, as the request has none of its own."""

    @property
    def leave_out(self) -> str:
        """The next step of a client that can do without them."""
        if self.declared:
            return 'send tool_choice: "none" to leave out the tools that the prompt declares'
        return "leave tools out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The demands of a request on its answer."""

    tools: tuple[Tool, ...] = ()
    """Those that the model is shown."""
    schema: dict[str, Any] | None = None
    """Of the JSON that the whole answer must be."""
    is_call: bool = False
    """The schema is that of a tool call."""
    may_call: bool = False
    """The schema allows a tool call, beside the answer that the request wants."""

    @property
    def schema_param(self) -> str:
        """The parameter that the schema comes from."""
        return "tools" if self.is_call else "response_format"


def shown_tools(request: ChatRequest, declared: ToolSet | None) -> ShownTools:
    """The request's own tools, or else the `declared` ones of the prompt that it names."""
    if request.tool_choice == "none":
        return ShownTools()
    if request.tools:
        return ShownTools(tools=tuple(request.tools))
    if declared is not None:
        return ShownTools(tools=declared.tools, declared=True)
    return ShownTools()


def demand_of(
    request: ChatRequest,
    shown: ShownTools,
    model: DesiredModel,
    form: AnswerForm,
    kind: EngineKind,
) -> Demand:
    """Tools and format of the answer. Errors: RequestError for what cannot be had."""
    choice = request.tool_choice
    tools = shown.tools
    must_call = isinstance(choice, NamedTool) or choice == "required"
    if must_call and not tools:
        raise RequestError(
            400,
            "there are no tools to choose from",
            code="invalid_value",
            param="tool_choice",
            hint="add tools, or leave it out",
        )
    wanted = _wanted_json(request)
    if tools:
        is_bound = must_call or wanted is not None
        _refuse_tools(shown, model, form, kind, is_bound=is_bound)

    arguments = "arguments" if form.calls is None else form.calls.arguments_key
    if isinstance(choice, NamedTool):
        schema = call_schema(_chosen_tool(choice, tools), arguments)
        return Demand(tools=tools, schema=schema, is_call=True)

    if choice != "required" and (wanted is None or not tools):
        return Demand(tools=tools, schema=wanted)

    calls = [call_schema(tool, arguments, f"#/anyOf/{at}") for at, tool in enumerate(tools)]
    if choice == "required":
        return Demand(tools=tools, schema={"anyOf": calls}, is_call=True)

    answer = relocated(wanted, f"#/anyOf/{len(tools)}")
    for name in _OF_A_DOCUMENT:  # the references in it are now those of the whole
        answer.pop(name, None)
    return Demand(tools=tools, schema={"anyOf": [*calls, answer]}, may_call=True)


def _wanted_json(request: ChatRequest) -> dict[str, Any] | None:
    """The schema of the JSON that the answer must be, unless it is a call."""
    wanted = request.response_format
    if isinstance(wanted, JsonObject):
        return ANY_OBJECT
    if isinstance(wanted, JsonSchema):
        return wanted.json_schema.schema_
    return None


def call_schema(tool: Tool, arguments: str, place: str = "#") -> dict[str, Any]:
    """JSON schema of a call of `tool` that has its arguments under the key `arguments`.

    `place` is where it will stand in a larger schema.
    """
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            arguments: relocated(tool.arguments_schema, f"{place}/properties/{arguments}"),
        },
        "required": ["name", arguments],
        "additionalProperties": False,
    }


def _refuse_tools(
    shown: ShownTools, model: DesiredModel, form: AnswerForm, kind: EngineKind, *, is_bound: bool
) -> None:
    """Errors: RequestError if calls would not come back as calls."""
    if form.calls is None:
        raise RequestError(
            400,
            f"the chat template of {model.name!r} {form.why}",
            code="unsupported_parameter",
            param="tools",
            hint=f"{shown.leave_out}, or name a chat_template that knows them, "
            "such as chatml or llama3",
        )

    # A call in an answer that is bound to a schema is plain JSON, without control tokens.
    if form.calls.control and not is_bound and not ENGINES[kind].prints_control_tokens:
        raise RequestError(
            400,
            f"the model {model.name!r} writes calls with control tokens ({form.calls.name}), "
            f"which the engine {kind} does not print",
            code="unsupported_parameter",
            param="tools",
            hint=f"{shown.leave_out}, or demand a call with tool_choice: required",
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
