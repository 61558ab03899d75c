"""The requests of programs that people run: what each adds to one declared prompt, and when.

Every request differs from those before in what a program would change, too: the question, the time,
the user. What a program sends again each time, such as its tools, is the same. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]

HOUSE = "house"
"""The declared prompt."""

OTHER = "other"
"""The prompt of the program that asks in between."""

USERS = ("Ann", "Bartholomew", "Chiara", "Dmitri", "Eleanor", "Farid", "Grete", "Hiroshi")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request: what it adds to its conversation."""

    adds: tuple[Message, ...]
    conversation: str = ""
    row: str = ""
    """The row of the tables that it is measured for; empty: it only comes before."""


Turns = Callable[[int], list[Turn]]
"""The requests of the run with this number, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One kind of program."""

    name: str
    turns: Turns
    adds_to_system: Callable[[int], str] = lambda _: ""
    """Follows the declared text in the system message."""
    tools: tuple[Tool, ...] = ()
    are_declared: bool = False
    """The tools stand in the manifest, with the prompt."""
    keeps_answers: bool = True
    """The next request of a conversation has the model's own answer to this one."""
    is_hit: bool = False
    """What is measured begins with the whole text of the prompt cache, so it must be a hit."""

    @property
    def declared_tools(self) -> tuple[Tool, ...]:
        return self.tools if self.are_declared else ()


@dataclass(slots=True)
class Conversation:
    """The messages of one conversation as a client keeps them."""

    messages: list[Message] = field(default_factory=list)

    def ask(self, turn: Turn) -> list[Message]:
        """The messages of the next request."""
        self.messages.extend(turn.adds)
        return list(self.messages)

    def answered(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})


def question(number: int) -> Message:
    """A question that none of the thousand before it begins as."""
    return _user(f"{number % 1000:03d}: explain your three most important rules.")


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _single(row: str, before: Callable[[int], tuple[Message, ...]] = lambda _: ()) -> Turns:
    """The turns of a program that asks one question, after these messages."""

    def turns(number: int) -> list[Turn]:
        return [Turn(adds=(*before(number), question(number)), row=row)]

    return turns


def _date(number: int) -> str:
    minutes = 545 + number
    return f"\nToday is Friday, 2026-11-27, and it is {minutes // 60 % 24:02d}:{minutes % 60:02d}."


def _name(number: int) -> str:
    return f"\nThe user's name is {USERS[number % len(USERS)]}. "


def _memory(number: int) -> tuple[Message, ...]:
    user = USERS[number % len(USERS)]
    facts = f"What you remember: the user is {user}, and asked {number} questions this week."
    return ({"role": "system", "content": facts},)


# Conversations

TURNS = 8
TURNS_EACH = 4

_TOPICS = ("the roof", "the pump", "the heating", "the lamps", "the vents", "the tank", "the door")


def _talk(number: int, who: str, turn: int) -> Message:
    topic = _TOPICS[turn % len(_TOPICS)]
    return _user(f"{number % 1000:03d}, {who}, {turn + 1}: what should I do about {topic} today?")


def _conversation(number: int) -> list[Turn]:
    """Eight turns; the last one is measured."""
    turns = []
    for turn in range(TURNS):
        row = f"conversation, turn {TURNS}" if turn == TURNS - 1 else ""
        turns.append(Turn(adds=(_talk(number, "Ann", turn),), row=row))
    return turns


def _two_conversations(number: int) -> list[Turn]:
    """Four turns each, in turn; the last ones are measured."""
    turns = []
    for turn in range(TURNS_EACH):
        for order, who in (("first", "Ann"), ("second", "Bob")):
            row = ""
            if turn == TURNS_EACH - 1:
                row = f"two conversations in turn, turn {TURNS_EACH} of the {order}"
            turns.append(Turn(adds=(_talk(number, who, turn),), conversation=who, row=row))
    return turns


# Tools


def _tool(name: str, description: str, /, **properties: str) -> Tool:
    """All its parameters are texts, and required."""
    described = {key: {"type": "string", "description": about} for key, about in properties.items()}
    parameters = {"type": "object", "properties": described, "required": [*described]}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


WEATHER = _tool(
    "get_weather",
    "Say how the weather is now, and how it will be in the next hours, at one place.",
    city="The name of the town or the village, without its country.",
    unit="The unit of temperatures: celsius or fahrenheit.",
)

_PATH = (
    "The path of the file, relative to the top folder of the project, with forward slashes; paths "
    "that lead out of the project are refused with an error that names the folder."
)
_REASON = (
    "One sentence for the user that says why this is done now. It is shown before the tool is run, "
    "and kept in the protocol of the session together with the time and the result."
)
_LIMITS = (
    "Its result is cut after two hundred lines, and then ends with a line that says how many lines "
    "were left out; ask again with other arguments to see the rest. Do not use it to look at files "
    "that are not text, and never twice with the same arguments, because nothing changes unless "
    "you change it."
)

AGENT_TOOLS = (
    _tool(
        "list_folder",
        f"List the files and folders in a folder, with their sizes and times. {_LIMITS}",
        path=_PATH,
        pattern="Only names that match this pattern, with * and ?; an empty text matches all.",
        reason=_REASON,
    ),
    _tool(
        "read_file",
        f"Read a text file, or some lines of it, with the numbers of the lines. {_LIMITS}",
        path=_PATH,
        first_line="The number of the first line to read, as a text; lines count from 1.",
        last_line="The number of the last line to read, as a text; empty reads to the end.",
        reason=_REASON,
    ),
    _tool(
        "search_text",
        f"Search all files of the project for a regular expression, line by line. {_LIMITS}",
        expression="The regular expression, in the syntax of Python, without flags.",
        path=_PATH,
        reason=_REASON,
    ),
    _tool(
        "replace_text",
        "Replace a text that occurs exactly once in a file by another one. The old text must be "
        f"given whole, with all its blanks and line ends, and is compared as it is. {_LIMITS}",
        path=_PATH,
        old="The text to replace, with enough lines around it that it occurs once in the file.",
        new="The text to put in its place; an empty text deletes the old one.",
        reason=_REASON,
    ),
    _tool(
        "run_command",
        "Run a command in a shell, in the top folder of the project, for at most ten minutes, and "
        f"give its output, its errors and its exit code. {_LIMITS}",
        command="The command line, as one would type it; it has no terminal and no input.",
        timeout="The number of seconds after which it is ended, as a text; at most 600.",
        reason=_REASON,
    ),
    _tool(
        "ask_user",
        "Ask the user something that only he can decide, and wait for the answer. Use it when two "
        f"ways are open and the files do not say which of them is wanted. {_LIMITS}",
        question="The question: one or two sentences without technical terms.",
        choices="The possible answers, one a line; empty where the user should write freely.",
        reason=_REASON,
    ),
)
"""Six tools as a program for writing code brings them."""

_STEPS = (
    ("list_folder", {"path": "src", "pattern": "*.py", "reason": "To see what there is."}),
    ("read_file", {"path": "src/roof.py", "first_line": "1", "last_line": "20"}),
    ("search_text", {"expression": "open_roof", "path": "src", "reason": "Who calls it?"}),
)

_RESULTS = (
    "src/roof.py 2,114 bytes\nsrc/pump.py 1,808 bytes\nsrc/heating.py 3,020 bytes",
    "1: def open_roof(air, water):\n2:     return air > 26 and water > 18 and not is_night()",
    "src/main.py:14: if open_roof(air, water):\nsrc/main.py:31: open_roof(30, 20)",
)


def _agent_loop(number: int) -> list[Turn]:
    """A task and three calls with their results, as recorded; the last step is measured."""
    turns = [Turn(adds=(_user(f"{number % 1000:03d}: the roof opens at night. Find out why."),))]
    for step, (name, arguments) in enumerate(_STEPS):
        call_id = f"call{number % 1000:03d}{step:02d}"
        function = {"name": name, "arguments": json.dumps(arguments)}
        call = {"id": call_id, "type": "function", "function": function}
        asked = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": call_id, "content": _RESULTS[step]}
        turns.append(Turn(adds=(asked, result)))

    # The answer is begun, so that it is no call, whose first token no client sees by itself.
    begun = {"role": "assistant", "content": "The roof opens at night because"}
    last = replace(
        turns[-1], adds=(*turns[-1].adds, begun), row="agent loop, six tools declared, step 4"
    )
    return [*turns[:-1], last]


SHAPES = (
    Shape(name="plain", turns=_single("plain"), is_hit=True),
    Shape(name="date", turns=_single("a date line at the end"), adds_to_system=_date),
    Shape(name="name", turns=_single("the user's name and a trailing blank"), adds_to_system=_name),
    Shape(name="tool", turns=_single("one tool, undeclared"), tools=(WEATHER,)),
    Shape(
        name="declared tool",
        turns=_single("one tool, declared"),
        tools=(WEATHER,),
        are_declared=True,
        is_hit=True,
    ),
    Shape(name="memory", turns=_single("a memory block", _memory)),
    Shape(name="conversation", turns=_conversation),
    Shape(name="two conversations", turns=_two_conversations),
    Shape(
        name="agent",
        turns=_agent_loop,
        tools=AGENT_TOOLS,
        are_declared=True,
        keeps_answers=False,
    ),
)
"""In the order of the tables: the prompt without tools, with one, without, with six."""
