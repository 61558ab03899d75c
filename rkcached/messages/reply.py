"""Takes a model's text apart as it comes: reasoning, content, tool calls. Pure.

Tags may be cut anywhere between two pieces, so what could be the beginning of one is held back.
Nothing is lost: what looks like a tool call and is none comes out as content, letter by letter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final

from rkcached.messages.template import ToolStyle

_THINK = "<think>"
_THINK_END = "</think>"
_CALL = "<tool_call>"
_CALL_END = "</tool_call>"
_PYTHON_TAG: Final = "<|python_tag|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    name: str
    arguments: str
    """A JSON object as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of an answer: exactly one of the three."""

    content: str = ""
    reasoning: str = ""
    call: ToolCall | None = None


class _Mode(Enum):
    START = auto()
    """There is nothing but white space yet, or a tag has just ended."""
    REASONING = auto()
    CONTENT = auto()
    CALL = auto()
    """The text is inside <tool_call>."""
    BARE_CALL = auto()
    """The rest is one or more calls as Llama writes them, or content: that is known at its end."""


class Reply:
    """Feed it the pieces of an answer, then end it.

    `style` is how the model writes tool calls, None if it was given no tools; `tools` are their
    names. `forced`: the whole answer is one call in JSON, as its schema demanded. `reasons`: the
    prompt ended inside <think>.
    """

    def __init__(
        self,
        *,
        style: ToolStyle | None = None,
        tools: frozenset[str] = frozenset(),
        forced: bool = False,
        reasons: bool = False,
    ) -> None:
        self._style = style
        self._tools = tools
        self._held = ""
        self._may_reason = not forced
        self._mode = _Mode.START
        if forced:
            self._mode = _Mode.BARE_CALL
        elif reasons:
            self._mode = _Mode.REASONING

        # The reasoning has not begun: its leading newlines are the template's, not the model's.
        self._at_line_start = True

    def feed(self, text: str) -> Iterator[Delta]:
        self._held += text
        moved = True
        while moved and self._held:
            before = (self._mode, len(self._held))
            yield from self._step()
            moved = before != (self._mode, len(self._held))

    def end(self) -> Iterator[Delta]:
        """Return the text that was held back."""
        if self._mode is _Mode.START:
            self._drop_newlines()

        held = self._held
        self._held = ""
        match self._mode:
            case _Mode.REASONING:
                yield from _some(Delta(reasoning=held))
            case _Mode.CALL:  # many models end before the closing tag
                yield _call_or_content(held, _CALL + held)
            case _Mode.BARE_CALL:
                if calls := self._bare_calls(held):
                    yield from (Delta(call=call) for call in calls)
                else:
                    yield from _some(Delta(content=held))
            case _:
                yield from _some(Delta(content=held))

    def _step(self) -> Iterator[Delta]:
        match self._mode:
            case _Mode.START:
                self._start()
            case _Mode.REASONING:
                yield from self._reason()
            case _Mode.CONTENT:
                yield from self._take_content()
            case _Mode.CALL:
                body = self._called()
                if body is not None:
                    self._held = self._held[len(body) + len(_CALL_END) :]
                    self._mode = _Mode.START
                    yield _call_or_content(body, _CALL + body + _CALL_END)
            case _Mode.BARE_CALL:
                pass

    def _take_content(self) -> Iterator[Delta]:
        if self._style is not ToolStyle.HERMES:
            text = self._held
            self._held = ""
            yield from _some(Delta(content=text))
            return

        text, tag = self._until(_CALL)
        yield from _some(Delta(content=text))
        if tag:
            self._mode = _Mode.CALL

    def _called(self) -> str | None:
        """The text before the closing tag.

        None as long as that may be a part of a string in the call.
        """
        end = self._held.find(_CALL_END)
        while end >= 0:
            body = self._held[:end]
            if not _ends_in_a_string(body):
                return body
            end = self._held.find(_CALL_END, end + 1)

        return None

    def _reason(self) -> Iterator[Delta]:
        if self._at_line_start:
            self._held = self._held.lstrip("\n")
            self._at_line_start = not self._held

        text, tag = self._until(_THINK_END)
        yield from _some(Delta(reasoning=text))
        if tag:
            self._mode = _Mode.START
            self._may_reason = False

    def _start(self) -> None:
        """Decide what begins here, as soon as that is certain."""
        text = self._held.lstrip()
        tags = []
        if self._may_reason:
            tags.append(_THINK)
        if self._style is ToolStyle.HERMES:
            tags.append(_CALL)
        if self._style is ToolStyle.LLAMA3:
            tags.append(_PYTHON_TAG)
        if any(tag.startswith(text[: len(tag)]) and len(text) < len(tag) for tag in tags):
            return  # also when there is only white space

        if self._may_reason and text.startswith(_THINK):
            self._held = text.removeprefix(_THINK)
            self._mode = _Mode.REASONING
            self._may_reason = False
        elif self._style is ToolStyle.HERMES and text.startswith(_CALL):
            self._held = text.removeprefix(_CALL)
            self._mode = _Mode.CALL
            self._may_reason = False
        elif self._style is ToolStyle.LLAMA3 and text.startswith((_PYTHON_TAG, "{")):
            self._held = text.removeprefix(_PYTHON_TAG)
            self._mode = _Mode.BARE_CALL
        else:
            self._drop_newlines()
            if self._held:
                self._mode = _Mode.CONTENT
                self._may_reason = False

    def _drop_newlines(self) -> None:
        """Drop the newlines between a tag and the content: they are not content."""
        if not self._may_reason:
            self._held = self._held.lstrip("\n")

    def _until(self, tag: str) -> tuple[str, str]:
        """Take the text before `tag`, and the tag; or what cannot be a part of it, and nothing."""
        text, tag_found, rest = self._held.partition(tag)
        if tag_found:
            self._held = rest
            return text, tag

        keep = next(
            (n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0
        )
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], ""

    def _bare_calls(self, text: str) -> list[ToolCall]:
        """The calls that `text` consists of, all to known tools; else none."""
        decoder = json.JSONDecoder()
        calls = []
        at = 0
        text = text.strip()

        while at < len(text):
            try:
                value, at = decoder.raw_decode(text, at)
                call = _of_value(value)
            except (ValueError, RecursionError):
                return []

            if call is None or call.name not in self._tools:
                return []

            calls.append(call)
            while at < len(text) and text[at] in "; \r\n\t":
                at += 1

        return calls


def _call_or_content(body: str, content: str) -> Delta:
    """The call that `body` is; else `content`, the text as it was written."""
    if call := _call(body):
        return Delta(call=call)
    return Delta(content=content)


def _ends_in_a_string(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        return False

    return False


def _call(text: str) -> ToolCall | None:
    try:
        return _of_value(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _of_value(value: Any) -> ToolCall | None:
    """Errors: ValueError, RecursionError."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None

    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the object as text
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        return None

    value["name"].encode()
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if not _is_text(written):
        written = json.dumps(arguments)  # half a surrogate pair can only be written as an escape
    return ToolCall(name=value["name"], arguments=written)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _some(delta: Delta) -> list[Delta]:
    if delta.content or delta.reasoning:
        return [delta]
    return []
