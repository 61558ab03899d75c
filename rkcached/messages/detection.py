"""Finds out how a template's model writes its answers: by letting the template write some. Pure.

A template writes an earlier answer with tool calls as the model is to write the next one. So a
known call goes in, and the form that reads exactly that call in what comes out is the model's: who
shows tools can read the calls, by proof. Some templates drop earlier calls; for these, only the
words by which they tell the model a form are left. It takes some dozen renderings at most, and a
slow template is given up.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, ParamSpec

from rkcached.errors import TemplateError, TemplateExhausted
from rkcached.messages.call_form import CallForm
from rkcached.messages.call_readers import ToolCall, Tools
from rkcached.messages.calls import KNOWN, TABLE
from rkcached.messages.reasoning import Marks, marks_of
from rkcached.messages.reply import Reply

Render = Callable[[Sequence[Any], Sequence[Any]], str]
"""Renders messages and tools. Errors: TemplateError."""

TRIALS_S: Final = 2.0
"""Limit of the time of all renderings that try a template, but for the last of them. They take
some milliseconds, and requests for other models wait."""

_MAX_CHARACTERS: Final = 1 << 16
"""The longest rendering that is looked at. Our conversations are short."""

_NAME: Final = "look_up"
_USER: Final = {"role": "user", "content": "Q"}
_CONTENT: Final = "Zq4-probe-of-the-answer"
_PARAMETERS: Final = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "description": "A text."},
        "count": {"type": "integer", "description": "A number."},
        "extra": {"type": "object", "description": "An object."},
    },
    "required": ["text"],
}
_TOOL: Final = {
    "type": "function",
    "function": {"name": _NAME, "description": "Looks it up.", "parameters": _PARAMETERS},
}
_TOOLS: Final[Tools] = {_NAME: _PARAMETERS}

# The first has characters that JSON, Python and XML write otherwise. Templates that write them
# wrongly, as many do, are tried with plainer arguments: their models were taught by better ones.
_ARGUMENTS: Final[tuple[dict[str, Any], ...]] = (
    {
        "text": 'it\'s a "té\\st"\n{x: [1, 2]} & 5 < 6',
        "count": 7,
        "extra": {"a": [1, True], "b": "z"},
    },
    {"text": "red apples", "count": 7, "extra": {"a": [1, True], "b": "z"}},
    {"text": "red apples"},
)

# Mistral's templates want ids of nine characters, Kimi's write the id instead of the name.
_IDS: Final = ("abcdefgh{}", f"functions.{_NAME}:{{}}")

# The end of a turn that has calls may be another than of one that has none.
_END_MARKS: Final = re.compile(r"(?:<[^<>]{0,30}>?\s*)+\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """How a model writes its answers."""

    marks: Marks
    calls: CallForm | None = None
    """None if the template cannot show tools, or if no form reads its calls."""
    why: str = ""
    """Why there are no calls, as the end of a sentence about the template."""


@dataclass(frozen=True, slots=True)
class _Probe:
    """A conversation with calls, as it was rendered."""

    calls: list[ToolCall]
    text: str
    begin: int
    """Where the answer with the calls begins, or a little later."""
    end: int


Given = ParamSpec("Given")


def within_limit(name: str, write: Callable[Given, str]) -> Callable[Given, str]:
    """Write as `write` does, to try the template `name`, for a time that begins now.

    Errors: TemplateExhausted when the time is used up.
    """
    deadline = time.monotonic() + TRIALS_S

    def limited(*args: Given.args, **kwargs: Given.kwargs) -> str:
        if time.monotonic() > deadline:
            raise TemplateExhausted(
                f"template {name} is too slow: {TRIALS_S:g} s were not enough to find out what it "
                "takes and how it writes calls",
                hint="choose another chat_template, or find what makes it slow",
            )

        return write(*args, **kwargs)

    return limited


def detect(source: str, render: Render) -> AnswerForm:
    """Errors: TemplateExhausted."""
    marks = marks_of(source)
    try:
        prompt = _shown(render)
    except TemplateExhausted:
        raise
    except TemplateError as error:
        return AnswerForm(marks=marks, why=f"cannot show tools: {error.message}")

    if _NAME not in prompt:
        return AnswerForm(marks=marks, why="cannot show tools")

    for probe in _probes(render, prompt):
        form = _form_of(probe, marks)
        if form is not None:
            return AnswerForm(marks=marks, calls=form)

    for form in TABLE:
        if any(all(word in source for word in words) for words in form.told_by):
            return AnswerForm(marks=marks, calls=form)

    return AnswerForm(
        marks=marks,
        why=f"shows tools, but writes calls in a form that is not known; known forms: {KNOWN}",
    )


def _shown(render: Render, *more: dict[str, Any]) -> str:
    """A question, tools, and more messages. Errors: TemplateError."""
    text = render([_USER, *more], [_TOOL])
    if len(text) > _MAX_CHARACTERS:
        raise TemplateError(f"it writes {len(text):,} characters for a short conversation")
    return text


def _probes(render: Render, prompt: str) -> Iterator[_Probe]:
    """The conversations that the template renders with their calls, the most telling first."""
    try:
        plain = _shown(render, {"role": "assistant", "content": _CONTENT})
    except TemplateExhausted:
        raise
    except TemplateError:
        return

    tail = plain.rpartition(_CONTENT)[2]
    for arguments in _ARGUMENTS:
        for many in (True, False):
            for with_results in (False, True):
                for ids in _IDS:
                    probe = _probe(
                        render, prompt, tail, arguments, ids, many=many, with_results=with_results
                    )
                    if probe is not None:
                        yield probe


def _probe(
    render: Render,
    prompt: str,
    tail: str,
    values: dict[str, Any],
    ids: str,
    *,
    many: bool,
    with_results: bool,
) -> _Probe | None:
    """`tail`: what follows an answer without calls."""
    arguments = [values]
    if many:
        arguments.append({"text": "ü"})

    calls = []
    for at, each in enumerate(arguments):
        function = {"name": _NAME, "arguments": each}
        calls.append({"id": ids.format(at), "type": "function", "function": function})

    with_calls = {"role": "assistant", "content": "", "tool_calls": calls}
    results = []
    if with_results:
        results = [
            {"role": "tool", "content": "R", "name": _NAME, "tool_call_id": call["id"]}
            for call in calls
        ]

    try:
        whole = _shown(render, with_calls, *results)
    except TemplateExhausted:
        raise
    except TemplateError:
        return None

    begin = _common_length(prompt, whole)
    end = len(whole) - _common_length(tail[::-1], whole[::-1])
    if _NAME not in whole[max(0, begin - len(_NAME)) :]:
        return None
    expected = [
        ToolCall(name=_NAME, arguments=json.dumps(each, ensure_ascii=False)) for each in arguments
    ]
    return _Probe(expected, whole, begin, max(begin, end))


def _common_length(left: str, right: str) -> int:
    length = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        length += 1

    return length


def _form_of(probe: _Probe, marks: Marks) -> CallForm | None:
    for form in TABLE:
        if any(_reads(form, marks, text, probe.calls) for text in _answers(form, probe)):
            return form

    return None


def _answers(form: CallForm, probe: _Probe) -> Iterator[str]:
    """Where the answer may stand in the text."""
    answer = probe.text[probe.begin : probe.end]
    if form.bare or form.named_first:
        yield answer
        yield _END_MARKS.sub("", answer)

    # The prompt may go on as the first letters of the opening do.
    for opening in form.opened_first(_TOOLS):
        place = probe.text.find(opening, max(0, probe.begin - len(opening) - 1))
        if place >= 0:
            yield probe.text[place : max(place, probe.end)]
            yield _END_MARKS.sub("", probe.text[place : max(place, probe.end)])
            yield probe.text[place:]


def _reads(form: CallForm, marks: Marks, text: str, calls: list[ToolCall]) -> bool:
    reply = Reply(form=form, tools=_TOOLS, marks=marks)
    found = []
    for deltas in (reply.feed(text), reply.end()):
        found += [delta.call for delta in deltas if delta.call is not None]
    return _plain(found) == _plain(calls)


def _plain(calls: list[ToolCall]) -> list[tuple[str, Any]]:
    """Calls as they compare: the order of arguments, and ids, do not matter."""
    return [(call.name, json.loads(call.arguments)) for call in calls]
