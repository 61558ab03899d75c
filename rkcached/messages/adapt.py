"""Puts messages into a form that a template takes, where it refuses what clients send. Pure.

Clients do not know which template a server uses. Some templates have no system turn, and some want
call ids of their own form: they raise, and the client cannot help it. Each such habit is an
`Adaptation`: a conversation to try the template with, and what to change if it refuses that.

OpenAI's tools need neither a description nor parameters, and some templates raise without them:
`whole_tools` adds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rkcached.messages.message import Message

_BETWEEN: Final = "\n\n"
"""Between a system message and the user's, as Gemma 3's own template has it."""

_ID_LENGTH: Final = 9

Change = Callable[[Sequence[Message]], list[Message]]
"""Makes changed copies; the messages themselves stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """A change for templates that refuse the probe, and take the changed probe."""

    name: str
    probe: tuple[Message, ...]
    concerns: Callable[[Message], bool]
    """Whether there is something to change in a conversation with this message."""
    change: Change


def whole_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools with an empty description and an empty object of parameters where they have none.

    Makes changed copies.
    """
    changed = []
    for tool in tools:
        function = {"description": "", **tool["function"]}
        parameters = function.get("parameters", {})
        function["parameters"] = {"type": "object", "properties": {}, **parameters}
        changed.append({**tool, "function": function})

    return changed


def _is_system(message: Message) -> bool:
    return message["role"] == "system"


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    """Put each system message in front of the text of the user's message that follows.

    The text of a prompt thus stands before the user's, so a prompt cache can hold it.
    """
    folded: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if _is_system(message):
            waiting.append(message["content"])
            continue

        if waiting and message["role"] == "user":
            content = _BETWEEN.join([*waiting, message["content"]])
            folded.append(Message(**{**message, "content": content}))
        else:
            folded += _own_turn(waiting)
            folded.append(message)
        waiting = []

    return folded + _own_turn(waiting)


def _own_turn(texts: list[str]) -> list[Message]:
    """A turn of the user's for system messages that none of the user's follows."""
    return [Message(role="user", content=_BETWEEN.join(texts))] if texts else []


def _has_id(message: Message) -> bool:
    return "tool_calls" in message or "tool_call_id" in message


def _shorten_ids(messages: Sequence[Message]) -> list[Message]:
    """Give calls and results ids of nine letters and digits: Mistral's templates take no others.

    They are the last nine of the id, as vLLM cuts it, filled up with zeros if it has fewer. The
    same id becomes the same each time, so the text of a conversation does not change as it goes on.
    """
    changed = []
    for message in messages:
        copy = Message(**message)
        if "tool_call_id" in copy:
            copy["tool_call_id"] = _short_id(copy["tool_call_id"])
        if "tool_calls" in copy:
            copy["tool_calls"] = [_with_short_id(call) for call in copy["tool_calls"]]
        changed.append(copy)

    return changed


def _with_short_id(call: dict[str, Any]) -> dict[str, Any]:
    return call | {"id": _short_id(str(call.get("id", "")))}


def _short_id(whole: str) -> str:
    usable = "".join(c for c in whole if c.isascii() and c.isalnum())
    return usable[-_ID_LENGTH:].rjust(_ID_LENGTH, "0")


def _has_calls(message: Message) -> bool:
    return "tool_calls" in message


def _arguments_as_text(messages: Sequence[Message]) -> list[Message]:
    """Give the arguments of calls as JSON: Functionary's templates take no objects."""
    changed = []
    for message in messages:
        copy = Message(**message)
        if "tool_calls" in copy:
            copy["tool_calls"] = [_with_text(call) for call in copy["tool_calls"]]
        changed.append(copy)

    return changed


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}


def _is_result(message: Message) -> bool:
    return message["role"] == "tool"


def _name_results(messages: Sequence[Message]) -> list[Message]:
    """Give each result of a tool the name of its call: OpenAI's clients send only the id."""
    names: dict[str, str] = {}
    changed = []
    for message in messages:
        for call in message.get("tool_calls", ()):
            names[call.get("id", "")] = call["function"]["name"]

        copy = Message(**message)
        name = names.get(message.get("tool_call_id", ""))
        if _is_result(message) and name is not None:
            copy.setdefault("name", name)
        changed.append(copy)

    return changed


def _has_thinking(message: Message) -> bool:
    return "thinking" in message


def _drop_thinking(messages: Sequence[Message]) -> list[Message]:
    """Leave out the reasoning beside a text and calls: gpt-oss's template shows one of the two."""
    changed = []
    for message in messages:
        copy = Message(**message)
        if copy["content"] and copy.get("tool_calls"):
            copy.pop("thinking", None)
        changed.append(copy)

    return changed


def _called(call_id: str, *, named: bool = True, reasoning: str = "") -> list[Message]:
    """A call, and its result. With reasoning the call has a text, too."""
    call = {
        "id": call_id,
        "type": "function",
        "function": {"name": "f", "arguments": {"a": "b"}},
    }
    answer = Message(role="assistant", content="", tool_calls=[call])
    if reasoning:
        answer |= {"content": "c", "reasoning_content": reasoning, "thinking": reasoning}

    result = Message(role="tool", content="r", tool_call_id=call_id)
    if named:
        result["name"] = "f"
    return [answer, result]


_USER: Final = Message(role="user", content="u")

ADAPTATIONS: Final = (
    Adaptation(
        name="system",
        probe=(Message(role="system", content="s"), _USER),
        concerns=_is_system,
        change=_fold_system,
    ),
    Adaptation(
        name="ids",
        probe=(_USER, *_called("call_0123456789abcdef"), *_called("c1")),
        concerns=_has_id,
        change=_shorten_ids,
    ),
    Adaptation(
        name="arguments",
        probe=(_USER, _called("call12345")[0]),
        concerns=_has_calls,
        change=_arguments_as_text,
    ),
    Adaptation(
        name="names",
        probe=(_USER, *_called("call12345", named=False)),
        concerns=_is_result,
        change=_name_results,
    ),
    Adaptation(
        name="thinking",
        probe=(_USER, *_called("call12345", reasoning="r")),
        concerns=_has_thinking,
        change=_drop_thinking,
    ),
)
