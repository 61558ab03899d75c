"""Takes a model's text apart as it comes: reasoning, content, tool calls. Pure.

Marks may be cut anywhere between two pieces, so what could be the beginning of one is held back.
Nothing is lost: what looks like a tool call and is none comes out as content, letter by letter.
No character is looked at more than a few times, however long the answer is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from rkcached.messages.call_form import CallForm
from rkcached.messages.call_readers import Read, ToolCall, Tools, json_calls
from rkcached.messages.marks import MarkFinder, Opened
from rkcached.messages.reasoning import THINK, Marks


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of an answer: exactly one of the three."""

    content: str = ""
    reasoning: str = ""
    call: ToolCall | None = None


class _Mode(Enum):
    START = auto()
    """There is nothing but white space yet, or a mark has just ended."""
    REASONING = auto()
    DOUBT = auto()
    """A call has begun within reasoning: it is one if the reasoning does not go on after it."""
    CONTENT = auto()
    CALL = auto()
    """The text is between the marks of a call."""
    BARE_CALL = auto()
    """The rest is one or more calls without marks, or content: that is known at its end."""


class Reply:
    """Feed it the pieces of an answer, then end it.

    `form` is how the model writes tool calls, None if it was given no tools; `tools` are those.
    `marks` are around its reasoning. `forced`: the whole answer is JSON by a schema that demands or
    allows a call. `reasons`: the prompt ended inside reasoning.
    """

    def __init__(
        self,
        *,
        form: CallForm | None = None,
        tools: Tools | None = None,
        marks: Marks = THINK,
        forced: bool = False,
        reasons: bool = False,
    ) -> None:
        self._form = form
        self._tools = tools or {}
        self._marks = marks
        self._is_forced = forced
        self._may_reason = not forced
        self._mode = _Mode.START
        if forced:
            self._mode = _Mode.BARE_CALL
        elif reasons:
            self._mode = _Mode.REASONING

        opened: tuple[str, ...] = ()
        opened_first: tuple[str, ...] = ()
        self._bare: tuple[str, ...] = ()
        if form is not None:
            opened = form.opened(self._tools)
            opened_first = form.opened_first(self._tools)
            self._bare = form.bare
        self._opened_first = frozenset(opened_first)
        self._dropped_first = frozenset((*marks.dropped, *marks.dropped_first))
        self._closed = MarkFinder(marks.closings)
        self._reasoning_end = MarkFinder((*marks.closings, *opened))
        again = marks.openings if marks.again else ()
        self._content_end = MarkFinder((*opened, *marks.dropped, *again))

        self._held = ""
        self._blank: list[str] = []  # white space before the first mark or word
        self._rest: list[str] = []  # the text of a bare call, or of one in doubt
        self._before = ""  # white space before the opening of a call
        self._opening = ""
        self._call = Opened((), ())
        self._is_after_mark = False
        # The reasoning has not begun: its leading newlines are the template's, not the model's.
        self._at_line_start = True

    def feed(self, text: str) -> Iterator[Delta]:
        self._held += text
        yield from self._go_on(final=False)

    def end(self) -> Iterator[Delta]:
        """Return the text that was held back."""
        yield from self._go_on(final=True)

        match self._mode:
            case _Mode.START:
                yield from self._content("".join(self._blank))
            case _Mode.CALL:  # many models end before the closing mark
                yield from self._calls_or_content("")
            case _Mode.BARE_CALL:
                yield from self._bare_calls("".join(self._rest))
            case _Mode.DOUBT:
                yield from self._calls_or_reasoning("".join(self._rest))

    def _go_on(self, *, final: bool) -> Iterator[Delta]:
        moved = True
        while moved and self._held:
            before = (self._mode, len(self._held))
            match self._mode:
                case _Mode.START:
                    yield from self._start(final=final)
                case _Mode.REASONING:
                    yield from self._reason(final=final)
                case _Mode.DOUBT:
                    yield from self._wait_for_closing(final=final)
                case _Mode.CONTENT:
                    yield from self._take_content(final=final)
                case _Mode.CALL:
                    yield from self._take_call()
                case _Mode.BARE_CALL:
                    self._rest.append(self._held)
                    self._held = ""
            moved = before != (self._mode, len(self._held))

    def _start(self, *, final: bool) -> Iterator[Delta]:
        """Decide what begins here, as soon as that is certain."""
        text = self._held.lstrip()
        self._blank.append(self._held[: len(self._held) - len(text)])
        self._held = text
        if not text:
            return

        marks = [*self._opened_first, *self._dropped_first, *self._bare]
        if self._may_reason:
            marks += self._marks.openings
        if not final and any(len(text) < len(mark) and mark.startswith(text) for mark in marks):
            return

        begun = max((mark for mark in marks if text.startswith(mark)), key=len, default="")
        if begun and begun in self._bare:
            self._rest = self._blank
            self._blank = []
            self._mode = _Mode.BARE_CALL
        elif begun:
            self._held = text.removeprefix(begun)
            self._begin(begun)
        else:
            blank = "".join(self._blank)
            self._blank = []
            self._mode = _Mode.CONTENT
            self._may_reason = self._marks.again
            yield from self._content(blank)

    def _begin(self, mark: str) -> None:
        """Go on after a mark."""
        self._before = "".join(self._blank)
        self._blank = []
        self._is_after_mark = True
        if mark in self._marks.openings:
            self._mode = _Mode.REASONING
            self._at_line_start = True
            self._may_reason = self._marks.again
        elif mark in self._dropped_first:
            self._mode = _Mode.START
        elif self._form is not None:
            self._mode = _Mode.CALL
            self._may_reason = self._marks.again
            self._opening = mark
            self._call = Opened(self._form.closings, self._form.values)

    def _reason(self, *, final: bool) -> Iterator[Delta]:
        if self._at_line_start:
            self._held = self._held.lstrip("\n")
            self._at_line_start = not self._held

        place, mark = self._reasoning_end.find(self._held, final=final)
        text = self._held[:place]
        self._held = self._held[place + len(mark) :]
        if text:
            yield Delta(reasoning=text)
        if mark in self._marks.closings:
            self._end_reasoning()
        elif mark:
            self._mode = _Mode.DOUBT
            self._rest = [mark]

    def _end_reasoning(self) -> None:
        self._mode = _Mode.START
        self._is_after_mark = True
        self._may_reason = self._marks.again

    def _wait_for_closing(self, *, final: bool) -> Iterator[Delta]:
        """Hold back what follows a call, until the reasoning turns out to go on or to be over."""
        place, mark = self._closed.find(self._held, final=final)
        self._rest.append(self._held[:place])
        self._held = self._held[place + len(mark) :]
        if mark:
            yield Delta(reasoning="".join(self._rest))
            self._end_reasoning()

    def _calls_or_reasoning(self, text: str) -> Iterator[Delta]:
        """Models end their reasoning with a call now and then, without its closing."""
        reply = Reply(form=self._form, tools=self._tools, marks=self._marks)
        deltas = [*reply.feed(text), *reply.end()]
        if any(delta.call is not None for delta in deltas):
            yield from deltas
        else:
            yield Delta(reasoning=text)

    def _take_content(self, *, final: bool) -> Iterator[Delta]:
        place, mark = self._content_end.find(self._held, final=final)
        text = self._held[:place]
        self._held = self._held[place + len(mark) :]
        if text:
            yield Delta(content=text)
        if mark:
            self._begin(mark)

    def _content(self, blank: str) -> Iterator[Delta]:
        """White space before content: newlines after a mark are not content."""
        if self._is_after_mark:
            blank = blank.lstrip("\n")
        if blank:
            yield Delta(content=blank)

    def _take_call(self) -> Iterator[Delta]:
        closed = self._call.feed(self._held)
        self._held = ""
        if closed is not None:
            closing, self._held = closed
            yield from self._calls_or_content(closing)

    def _calls_or_content(self, closing: str) -> Iterator[Delta]:
        """The calls before the closing; else the text as it was written."""
        form = self._form
        body = self._call.body()
        calls: list[ToolCall] = []
        if form is not None and (closing or not form.must_close):
            is_named = self._opening not in (*form.openings, *form.first)
            calls = read_calls(form.read, self._opening + body if is_named else body, self._tools)

        if calls:
            self._mode = _Mode.START
            yield from (Delta(call=call) for call in calls)
        else:
            self._mode = _Mode.CONTENT
            yield Delta(content=self._before + self._opening + body + closing)

    def _bare_calls(self, text: str) -> Iterator[Delta]:
        """The calls that `text` consists of, all to known tools; else the text."""
        read = _WHOLE_ANSWER
        if self._is_forced:
            read = _demanded_call
        elif self._form is not None and self._bare:
            read = self._form.read
        calls = read_calls(read, text.strip(), self._tools)
        if calls and all(call.name in self._tools for call in calls):
            yield from (Delta(call=call) for call in calls)
        elif text:
            yield Delta(content=text)


_WHOLE_ANSWER = json_calls()


def _demanded_call(text: str, tools: Tools) -> list[ToolCall]:
    """The call that the whole answer is, as its schema has it.

    Where the schema allows another answer, too, that may be an object with a name.
    """
    value = json.loads(text)
    if not isinstance(value, dict) or not value.keys() & {"arguments", "parameters"}:
        return []
    return _WHOLE_ANSWER(text, tools)


def read_calls(read: Read, text: str, tools: Tools) -> list[ToolCall]:
    """The calls that a text consists of; none if it is anything else."""
    try:
        return read(text, tools)
    except (ValueError, RecursionError):
        return []
