"""Puts messages into a form that a template takes, where it refuses what clients send. Pure.

Clients do not know which template a server uses. Some templates have no system turn, and some want
call ids of their own form: they raise, and the client cannot help it. Each such habit is an
`Adaptation`: a conversation to try the template with, and what to change if it refuses that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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


_LONG_ID: Final = "call_0123456789abcdef"

ADAPTATIONS: Final = (
    Adaptation(
        name="system",
        probe=(Message(role="system", content="s"), Message(role="user", content="u")),
        concerns=_is_system,
        change=_fold_system,
    ),
    Adaptation(
        name="ids",
        probe=(
            Message(role="user", content="u"),
            Message(
                role="assistant",
                content="",
                tool_calls=[
                    {
                        "id": _LONG_ID,
                        "type": "function",
                        "function": {"name": "f", "arguments": {}},
                    }
                ],
            ),
            Message(role="tool", content="r", name="f", tool_call_id=_LONG_ID),
        ),
        concerns=_has_id,
        change=_shorten_ids,
    ),
    Adaptation(
        name="arguments",
        probe=(
            Message(role="user", content="u"),
            Message(
                role="assistant",
                content="",
                tool_calls=[
                    {
                        "id": "call12345",
                        "type": "function",
                        "function": {"name": "f", "arguments": {"a": "b"}},
                    }
                ],
            ),
        ),
        concerns=_has_calls,
        change=_arguments_as_text,
    ),
)
