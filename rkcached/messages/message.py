"""The form of a message that chat templates expect. Pure."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Message(TypedDict):
    """A message as templates get it.

    A call's `function` has a name and `arguments`: an object, or a text that is not one.
    """

    role: str
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]
    thinking: NotRequired[str]
    """The same reasoning, by the name that gpt-oss's template knows."""
