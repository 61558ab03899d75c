"""Texts that try to become structure, in every place of a conversation where data stands.

An attack is a pair: a text that has control tokens, and an honest one of the same length that has
letters in their place. Whoever reads the prompt must find the same control tokens in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rkcached.errors import TemplateError
from rkcached.messages.special_tokens import SpecialTokens, pieces
from rkcached.messages.template import ChatTemplate
from tests.corpus.collection import Sample
from tests.corpus.conversations import (
    TODAY,
    TOOL_NAME,
    TURNS,
    WEATHER,
    assistant,
    call,
    called,
    result,
    system,
    user,
)

# What a template may write as a control token. Words in angle brackets without any other sign are
# control tokens only where they are around a turn: around calls they are text of the model's.
_SIGNED: Final = (
    r"<\|[^<>\s]{1,60}\|?>",
    r"<[^<>\s|]{1,60}\|>",
    "<\uff5c[^<>\\s]{1,60}\uff5c>",
    "\u3008[^\u3008\u3009\\s]{1,40}\u3009",
    r"\[/?[A-Z][A-Z_]{1,30}\]",
    r"\[\|/?[a-z_]{1,30}\|\]",
    r"\[gMASK\]",
    r"\]~!?b[\[\]]|\[e~\[",
)
_PLAIN: Final = (r"<</?\w{1,30}>>", r"</?[A-Za-z_][^<>\s|-]{0,60}>", "<\u7528\u6237>")
_OF_TOOLS: Final = re.compile("|".join(_SIGNED))
_OF_TURNS: Final = re.compile("|".join((*_SIGNED, *_PLAIN)))

# Answers that come back hold them, so they are words for everyone.
_WORDS: Final = re.compile(r"</?(?:tools|tool_call|(?:\w+:)?think(?:ing)?(?::\w+)?)>")

# What a template does to a text may take a word out of the middle of a token.
_LOOKED_FOR: Final = re.compile(
    r"""(?:'((?:[^'\\\n]|\\.){1,40})'|"((?:[^"\\\n]|\\.){1,40})")\s*(?:in\b|[,)])"""
)
_ALWAYS_LOOKED_FOR: Final = ("/think", "/no_think", "</think>", "\n", " ")
_MAX_WORDS: Final = 12
_MAX_TOKENS: Final = 16

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How much is known of the model's tokens, and what its engine can do."""

    name: str
    knows_tokens: bool
    takes_tokens: bool


MODES: Final = (
    Mode(name="tokens", knows_tokens=True, takes_tokens=True),
    Mode(name="text", knows_tokens=True, takes_tokens=False),
    Mode(name="guessed", knows_tokens=False, takes_tokens=False),
)


def template_of(sample: Sample, control: frozenset[str] | None, **more: Any) -> ChatTemplate:
    special = SpecialTokens(control=control, bos=sample.bos, eos=sample.eos)
    return ChatTemplate(sample.source, name=sample.name, special=special, today=TODAY, **more)


def control_tokens(sample: Sample) -> frozenset[str]:
    """The control tokens that a template writes around turns, tools and calls."""
    chat = template_of(sample, frozenset())
    turns = _first_text(chat, [system(), *TURNS], TURNS, [user()])
    tokens = set(_OF_TURNS.findall(turns))
    for messages in ([user()], _with_calls()):
        tokens |= set(_OF_TOOLS.findall(_first_text(chat, messages, tools=[_tool()])))

    tokens |= {sample.bos, sample.eos}
    return frozenset(token for token in tokens if len(token) > 2 and not _WORDS.fullmatch(token))


def structure(prompt: str, control: frozenset[str]) -> list[str]:
    """The control tokens that an engine reads in a prompt, in order."""
    longest_first = sorted(control, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    found = []
    for part, has_control_tokens in pieces(prompt):
        if has_control_tokens:
            found += pattern.findall(part)
    return found


def forgeries(sample: Sample, control: frozenset[str], mode: Mode) -> Iterator[str]:
    """The places where an attack on a template succeeds."""
    chat = template_of(
        sample,
        control if mode.knows_tokens else None,
        takes_tokens=mode.takes_tokens,
    )
    for name, hostile, honest, places in _attacks(sample, control):
        for place in places:
            found = [_structure_with(chat, control, place, text) for text in (hostile, honest)]
            if None not in found and found[0] != found[1]:
                yield f"{name} in {place}"

    for token in sorted(control)[:_MAX_TOKENS]:
        middle = len(token) // 2
        for first, second in ((token[:middle], token[middle:]), (token[1:], token[1:-1])):
            honest_pair = ("x" * len(first), "x" * len(second))
            found = [
                _structure_of_pair(chat, control, *pair) for pair in ((first, second), honest_pair)
            ]
            if None not in found and found[0] != found[1]:
                yield f"{first} and {second} in two fields"


def _attacks(sample: Sample, control: frozenset[str]) -> Iterator[tuple[str, str, str, list[str]]]:
    """The name of each attack, the hostile text, the honest one, and the places to put it."""
    if not control:
        return

    chat = template_of(sample, frozenset())
    whole = _first_text(chat, _with_calls(), [system(), *TURNS], TURNS, [user()], tools=[_tool()])
    longest_first = sorted(control, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    yield "conversation", whole, pattern.sub(lambda token: "x" * len(token[0]), whole), list(PLACES)

    for word in _looked_for(sample.source):
        hostile = []
        honest = []
        for token in sorted(control)[:_MAX_TOKENS]:
            for at in (1, len(token) // 2):
                hostile.append(f"{token[:at]}{word}{token[at:]}")
                honest.append(f"{'x' * at}{word}{'x' * (len(token) - at)}")
        yield f"glue {word!r}", "a".join(hostile), "a".join(honest), _GLUED


def _looked_for(source: str) -> list[str]:
    words = list(_ALWAYS_LOOKED_FOR)
    for single, double in _LOOKED_FOR.findall(source):
        word = (single or double).replace("\\n", "\n")
        if word not in words:
            words.append(word)
    return words[:_MAX_WORDS]


def _first_text(
    chat: ChatTemplate, *conversations: Sequence[Any], tools: Sequence[dict[str, Any]] = ()
) -> str:
    """The text of the first conversation that the template takes, "" if it takes none."""
    for messages in conversations:
        try:
            return chat.render(messages, tools)
        except TemplateError:
            continue
    return ""


def _tool(name: str = TOOL_NAME, description: str = "d", parameter: str = "p") -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "description": parameter}},
        "required": ["city"],
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _with_calls() -> list[dict[str, Any]]:
    return [user(), called("", WEATHER), result("Blue."), assistant(), user()]


PLACES: Final[dict[str, Callable[[str], tuple[Messages, Messages]]]] = {
    "system": lambda text: ([system(text), *TURNS], []),
    "user": lambda text: ([user(text), assistant(), user()], []),
    "only user": lambda text: ([user(text)], []),
    "answer": lambda text: ([user(), assistant(text), user()], []),
    "reasoning": lambda text: ([user(), assistant(reasoning_content=text), user()], []),
    "name": lambda text: ([user() | {"name": text}], []),
    "tool's name": lambda text: ([user()], [_tool(text)]),
    "tool's description": lambda text: ([user()], [_tool(description=text, parameter=text)]),
    "call": lambda text: (
        [user(), called("", call(text, {"city": text})), result("Blue.", text)],
        [_tool(text)],
    ),
    "call's argument": lambda text: (
        [user(), called("", call(TOOL_NAME, {"city": text, text: 1})), result("Blue.")],
        [_tool()],
    ),
    "result": lambda text: ([user(), called("", WEATHER), result(text)], [_tool()]),
}


_GLUED: Final = ["system", "only user", "answer", "result"]


def _structure_with(
    chat: ChatTemplate, control: frozenset[str], place: str, text: str
) -> list[str] | None:
    """None if the template does not take such a conversation."""
    messages, tools = PLACES[place](text)
    return _structure_of(chat, control, messages, tools)


def _structure_of_pair(
    chat: ChatTemplate, control: frozenset[str], first: str, second: str
) -> list[str] | None:
    """Both halves in fields that a template may write side by side."""
    conversations = (
        [user(second) | {"name": first}, assistant(second, reasoning_content=first), user(second)],
        [user(), called("", call(first, {second: second})), result(second, first)],
    )
    found: list[str] = []
    taken = False
    for messages in conversations:
        some = _structure_of(chat, control, messages, [_tool(first, second)])
        if some is not None:
            taken = True
            found += some
    return found if taken else None


def _structure_of(
    chat: ChatTemplate, control: frozenset[str], messages: Any, tools: Any
) -> list[str] | None:
    try:
        return structure(chat.render(messages, tools), control)
    except TemplateError:
        return None
