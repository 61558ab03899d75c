"""The conversations that every template of the corpus is given. They are ours.

Their words stand nowhere else, so that a check can tell data from what a template writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Final

TODAY: Final = date(2024, 7, 26)
SYSTEM: Final = "You are Quorvel, and brief."
REASONING: Final = "Lutmar adds up, so it is four."
ANSWER: Final = "It is Plimsov."

TOOL_NAME: Final = "find_weather"
TOOL_DESCRIPTION: Final = "Tells the weather of a Brundlow."

TOOLS: Final[tuple[dict[str, Any], ...]] = (
    {
        "type": "function",
        "function": {
            "name": TOOL_NAME,
            "description": TOOL_DESCRIPTION,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name, such as 'Zürich'."},
                    "days": {"type": "integer", "description": "How many.", "minimum": 1},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add_numbers",
            "description": 'Adds <numbers> & "returns" their sum.',
            "parameters": {
                "type": "object",
                "properties": {"all": {"type": "array", "items": {"type": "number"}}},
                "required": ["all"],
            },
        },
    },
)

FIRST_CALL: Final = {"city": "Zürich", "days": 2}
SECOND_CALL: Final = {"all": [1, 2.5, -3]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    name: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)


def system(text: str = SYSTEM) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str = "How much is Vondrel?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str = ANSWER, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


def called(text: str, *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An answer with calls, each of which has an id of nine letters as Mistral's templates want."""
    return assistant(text, tool_calls=list(calls), **more)


def call(name: str, arguments: Any, number: int = 1) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"abcdefgh{number}", "type": "function", "function": function}


def result(text: str, name: str = TOOL_NAME, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "content": text, "name": name, "tool_call_id": f"abcdefgh{number}"}


WEATHER: Final = call(TOOL_NAME, FIRST_CALL)
SUM: Final = call("add_numbers", SECOND_CALL, 2)

TURNS: Final = (user(), assistant(), user("And Twimley?"))
REASONED: Final = (user(), assistant(reasoning_content=REASONING), user("And Twimley?"))

_SIGNS: Final = (
    "if a<b and c>d: print([1, {'x': \"y\"}], `z`, {{ e }}, {% f %}, 50% & $5 ~ ^_^ \\n #1 @2 !|?"
)

CONVERSATIONS: Final = (
    Conversation(name="user", messages=(user(),)),
    Conversation(name="system", messages=(system(), user())),
    Conversation(name="turns", messages=TURNS),
    Conversation(name="system, turns", messages=(system(), *TURNS)),
    Conversation(
        name="white space",
        messages=(
            system("\n\t  Two blanks before, a tab behind.\t"),
            user("  Blank lines.\n\n\n"),
            assistant("\n\nOne.\r\nTwo. \n"),
            user("\t\u00a0Three.\u2028 \n"),
        ),
    ),
    Conversation(
        name="unicode",
        messages=(
            system("Zürich, 東京, עברית, \U0001f642."),
            user("e\u0301 \u200b \ufeff \U0001f469\u200d\U0001f4bb İI ß"),
        ),
    ),
    Conversation(
        name="signs", messages=(system(_SIGNS), user(_SIGNS), assistant(_SIGNS), user(_SIGNS))
    ),
    Conversation(name="tools", messages=(user(),), tools=TOOLS),
    Conversation(name="system, tools", messages=(system(), user()), tools=TOOLS),
    Conversation(
        name="call",
        messages=(system(), user(), called("", WEATHER), result('{"sky": "blue", "°C": 21}')),
        tools=TOOLS,
    ),
    Conversation(
        name="call, answer",
        messages=(user(), called("", WEATHER), result("Blue."), assistant(), user("And Twimley?")),
        tools=TOOLS,
    ),
    Conversation(
        name="two calls",
        messages=(
            user(),
            called("I look.", WEATHER, SUM),
            result("Blue."),
            result("0.5", "add_numbers", 2),
        ),
        tools=TOOLS,
    ),
    Conversation(name="reasoning", messages=REASONED),
    Conversation(
        name="reasoning, call",
        messages=(
            user(),
            called("", WEATHER, reasoning_content=REASONING),
            result("Blue."),
        ),
        tools=TOOLS,
    ),
    Conversation(name="thinking", messages=(user(),), variables={"enable_thinking": True}),
    Conversation(name="no thinking", messages=(user(),), variables={"enable_thinking": False}),
    Conversation(
        name="system, thinking", messages=(system(), *REASONED), variables={"enable_thinking": True}
    ),
    Conversation(
        name="system, no thinking",
        messages=(system(), *REASONED),
        variables={"enable_thinking": False},
    ),
)
