"""Tools as OpenAI's API describes them, by one rule for a request and for a prompt's file. Pure."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

from rkcached.errors import SourceError
from rkcached.messages.bounds import MAX_VALUES, ValueCounter
from rkcached.messages.faults import Fault, first_fault
from rkcached.messages.record import ForeignFields, Many, Record
from rkcached.messages.strict_json import strict_json

MAX_TOOLS: Final = 128

_SHAPE: Final = '[{"type": "function", "function": {"name": ..., "parameters": {...}}}, ...]'
_FORM: Final = f"write {_SHAPE}"

# The end of what pydantic says of a text that is not JSON.
_POSITION: Final = re.compile(r" at line (\d+) column (\d+)$")

# In JSON: a backslash before it would be one of the text.
_NUL: Final = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(Record):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        default=None, description="JSON schema of the arguments."
    )
    strict: bool | None = None


class Tool(ForeignFields):
    type: Literal["function"]
    function: FunctionDefinition

    @property
    def arguments_schema(self) -> dict[str, Any]:
        """JSON schema of its arguments."""
        return self.function.parameters or {"type": "object"}

    def plain(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        return {
            "type": "function",
            "function": self.function.model_dump(exclude_none=True, exclude={"strict"}),
        }


ToolList = Annotated[Many[Tool], Field(max_length=MAX_TOOLS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSet:
    """The tools that belong to a prompt. Two are equal if every template writes them alike."""

    tools: tuple[Tool, ...] = field(compare=False)
    text: str
    """Their JSON, with the keys in the order that a template gets them in."""
    digest: str
    """SHA-256 in hexadecimal of all that a template gets of them, but for the order of keys."""

    @classmethod
    def of(cls, tools: Sequence[Tool]) -> ToolSet:
        plain = [tool.plain() for tool in tools]
        text = json.dumps(plain, ensure_ascii=False)
        in_order = json.dumps(plain, ensure_ascii=False, sort_keys=True)
        digest = hashlib.sha256(in_order.encode()).hexdigest()
        return cls(tools=tuple(tools), text=text, digest=digest)

    def plain(self) -> list[dict[str, Any]]:
        """The tools as chat templates expect them."""
        return [tool.plain() for tool in self.tools]

    def for_people(self) -> str:
        """The text of a file with them."""
        return json.dumps(self.plain(), ensure_ascii=False, indent=2) + "\n"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool.function.name for tool in self.tools)


def parse_tools(text: str, *, name: str) -> ToolSet:
    """The tools of a JSON text: the array that requests have under `tools`.

    `name` is that of its file. Errors: SourceError that begins with it, and with the line or the
    place in the JSON.
    """
    counter = ValueCounter()
    counter.feed(text.encode())
    if counter.count > MAX_VALUES:
        raise SourceError(
            f"{name} has more than {MAX_VALUES:,} values and keys",
            hint="declare fewer tools, or simplify their parameters",
        )

    try:
        value = strict_json(text.encode())
    except ValueError as error:
        raise _not_json(str(error), name) from error

    if value == []:
        raise SourceError(f"{name} has no tool", hint=f"{_FORM}, or remove `tools:`")

    try:
        tools = ToolSet.of(_list().validate_python(value))
    except ValidationError as error:
        raise _refused(first_fault(value, error), name) from error

    if _NUL.search(tools.text):
        raise SourceError(
            f"{name}: a text has a NUL character (\\u0000)",
            hint="remove it: many runtimes stop reading there",
        )
    return tools


@functools.cache
def _list() -> TypeAdapter[list[Tool]]:
    """Is made when it is first needed, as it takes some milliseconds."""
    return TypeAdapter(ToolList)


def _not_json(problem: str, name: str) -> SourceError:
    position = _POSITION.search(problem)
    if position is None:
        return SourceError(f"{name} is not JSON: {problem}", hint=_FORM)

    line, column = position.groups()
    problem = problem.removesuffix(position[0])
    return SourceError(f"{name}:{line}: not JSON: {problem} (column {column})", hint=_FORM)


def _refused(fault: Fault, name: str) -> SourceError:
    """The error of JSON that is not a list of tools."""
    if fault.place is None:
        return SourceError(f"{name}: the tools {fault.words}", hint=_FORM)
    match fault.kind:
        case "extra_forbidden":
            return SourceError(f"{name}: {fault.place} is not supported", hint="leave it out")
        case "missing":
            return SourceError(f"{name}: {fault.place} is missing", hint=_FORM)
        case _:
            return SourceError(f"{name}: {fault.place}: {fault.words}", hint="correct it")
