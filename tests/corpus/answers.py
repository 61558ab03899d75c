"""Whether what a model writes is read back: the template writes an answer, our reader takes it.

A template writes an earlier answer as its model is to write the next one. So the text between the
header of the answer and the end of the turn is what the model would send.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from rkcached.errors import TemplateError
from rkcached.messages.reply import Delta, Reply
from rkcached.messages.template import ChatTemplate
from tests.corpus.conversations import (
    ANSWER,
    FIRST_CALL,
    REASONING,
    SECOND_CALL,
    SUM,
    TOOL_DESCRIPTION,
    TOOL_NAME,
    TOOLS,
    WEATHER,
    assistant,
    called,
    user,
)

Outcome = tuple[str, str, str]
"""The case, what came of it, and the detail if it is not as it should be."""

_FIRST: Final = (TOOL_NAME, FIRST_CALL)
_SECOND: Final = ("add_numbers", SECOND_CALL)
_CASES: Final = (
    ("one call", called("", WEATHER), [_FIRST]),
    ("two calls", called("", WEATHER, SUM), [_FIRST, _SECOND]),
    ("text and a call", called(ANSWER, WEATHER), [_FIRST]),
)


_PARAMETERS: Final = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


def calls(chat: ChatTemplate) -> Iterator[Outcome]:
    """Whether the model is shown tools, and its calls are read as what they were."""
    prompt = _text(chat, [user()], TOOLS)
    if prompt is None or TOOL_NAME not in prompt or TOOL_DESCRIPTION not in prompt:
        yield "", "shows no tools", ""
        return

    yield "", "shows tools", ""
    for case, answer, expected in _CASES:
        names = [name for name, _ in expected]
        written = _written(chat, prompt, answer, TOOLS)
        if written is not None and not _has(written[0], names):
            written = _written(chat, prompt, _with_named_ids(answer), TOOLS)

        if written is None:
            yield case, "refused", ""
        elif not _has(written[0], names):
            yield case, "not written", ""
        else:
            is_read = any(_calls(chat, *answer) == expected for answer in _endings(chat, *written))
            yield case, "read" if is_read else "not read", "" if is_read else repr(written[0][:300])


def _has(text: str, names: list[str]) -> bool:
    return all(name in text for name in names)


def _with_named_ids(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer with ids as Kimi writes them: its template writes the id instead of the name."""
    renamed = []
    for number, call in enumerate(answer["tool_calls"]):
        renamed.append(call | {"id": f"functions.{call['function']['name']}:{number}"})
    return answer | {"tool_calls": renamed}


def _calls(chat: ChatTemplate, text: str, reasons: bool) -> list[tuple[str, Any]]:
    return [
        (delta.call.name, json.loads(delta.call.arguments))
        for delta in _read(chat, text, reasons, with_tools=True)
        if delta.call is not None
    ]


def _endings(chat: ChatTemplate, text: str, reasons: bool) -> Iterator[tuple[str, bool]]:
    """The answer as it is, and up to the token that ends a turn, where generation stops."""
    yield text, reasons
    plain = _text(chat, [user(), assistant()], TOOLS) or ""
    end = re.match(r"\s*(<[^<>]+>)", plain.rpartition(ANSWER)[2])
    if end is not None:
        yield text.partition(end[1])[0], reasons


def reasoning(chat: ChatTemplate) -> Iterator[Outcome]:
    """Whether reasoning that the template writes comes back as reasoning."""
    prompt = _text(chat, [user()])
    written = None
    if prompt is not None:
        written = _written(chat, prompt, assistant(reasoning_content=REASONING), ())
    if written is None:
        yield "", "refused", ""
        return
    if REASONING not in written[0]:
        yield "", "not written", ""
        return

    deltas = list(_read(chat, *written, with_tools=False))
    found = "".join(delta.reasoning for delta in deltas).strip()
    content = "".join(delta.content for delta in deltas)
    is_read = found == REASONING and (ANSWER in content) == (ANSWER in written[0])
    yield "", "read" if is_read else "not read", "" if is_read else repr(written[0][:300])


def _read(chat: ChatTemplate, text: str, reasons: bool, *, with_tools: bool) -> Iterator[Delta]:
    reply = Reply(
        form=chat.answer.calls if with_tools else None,
        tools=_PARAMETERS if with_tools else None,
        marks=chat.answer.marks,
        reasons=reasons,
    )
    yield from reply.feed(text)
    yield from reply.end()


def _written(
    chat: ChatTemplate, prompt: str, answer: dict[str, Any], tools: Any
) -> tuple[str, bool] | None:
    """The answer as the template writes it, and whether the prompt ended inside reasoning.

    None if the template refuses it.
    """
    whole = _text(chat, [user(), answer], tools)
    plain = _text(chat, [user(), assistant()], tools)
    if whole is None or plain is None:
        return None

    begin = _begin(whole, prompt)
    text = whole[begin:].removesuffix(plain.rpartition(ANSWER)[2])
    return text, chat.answer.marks.begun(whole[:begin])


def _begin(whole: str, prompt: str) -> int:
    """Where the answer begins: not inside of a mark that the prompt goes on with otherwise."""
    begin = 0
    while begin < len(prompt) and whole[begin : begin + 1] == prompt[begin]:
        begin += 1

    opened = whole.rfind("<", 0, begin)
    if opened > whole.rfind(">", 0, begin):
        return opened
    return begin


def _text(chat: ChatTemplate, messages: Any, tools: Any = ()) -> str | None:
    try:
        return chat.render(messages, tools)
    except TemplateError:
        return None
