"""Finds marks in a text that comes in pieces, which may cut a mark anywhere. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

# `<|x|>`, with fullwidth bars too; `<x>`; `[X]`; MiniMax's `]<]x[>[`.
_TOKEN = re.compile(r"<[|\uff5c]?[^<>|\uff5c\s]+[|\uff5c]?>|\[/?[A-Z][A-Z_ ]*\]|\]<\][^<>]+\[>\[")


def tokens_in(*marks: str) -> tuple[str, ...]:
    """The marks and the parts of them that may be tokens of their own."""
    found: dict[str, None] = {}
    for mark in marks:
        if len(mark) > 1:
            found[mark] = None
        found |= dict.fromkeys(_TOKEN.findall(mark))
    return tuple(found)


class MarkFinder:
    """The first of some marks in a text, the longest where several begin at one place."""

    def __init__(self, marks: Iterable[str]) -> None:
        ordered = sorted({mark for mark in marks if mark}, key=len, reverse=True)
        self._any = bool(ordered)
        self._whole = re.compile("|".join(map(re.escape, ordered)))
        self._begun = {mark[:n] for mark in ordered for n in range(1, len(mark))}
        self._longest = max(map(len, ordered), default=0)
        characters = {mark[0] for mark in ordered}
        self._first = re.compile("|".join(map(re.escape, sorted(characters))))

    def find(self, text: str, at: int = 0, *, final: bool = False) -> tuple[int, str]:
        """Where the first mark begins, and the mark.

        Without a mark, the place from where on one may have begun; the text's end if `final`, which
        means that no more will come.
        """
        if not self._any:
            return len(text), ""

        pending = len(text)
        if not final:
            pending = self._pending(text, at)
        match = self._whole.search(text, at)
        if match is None or match.start() >= pending:
            return pending, ""
        return match.start(), match[0]

    def _pending(self, text: str, at: int) -> int:
        """Where the text may end in the beginning of a mark; else its end."""
        begin = max(at, len(text) - self._longest + 1)
        for match in self._first.finditer(text, begin):
            if text[match.start() :] in self._begun:
                return match.start()

        return len(text)


class Opened:
    """The text after the opening of a call, up to its closing.

    A closing within a value is a part of it. `values` are the marks around values; in one between
    quotation marks, a backslash takes the next character's meaning.
    """

    def __init__(self, closings: tuple[str, ...], values: tuple[tuple[str, str], ...]) -> None:
        self._closings = frozenset(closings)
        self._outside = MarkFinder([*closings, *(begin for begin, _ in values)])
        self._inside = {begin: _value_end(begin, end) for begin, end in values}
        self._value = ""  # the mark that began the value which the text ends in
        self._parts: list[str] = []
        self._tail = ""

    def feed(self, text: str) -> tuple[str, str] | None:
        """The closing and the text after it, when it has come."""
        if not self._closings:
            self._parts.append(text)
            return None

        text = self._tail + text
        at = 0
        while True:
            finder = self._inside[self._value] if self._value else self._outside
            begin, mark = finder.find(text, at)
            end = begin + len(mark)
            if mark == "\\":
                end += 1
            if not mark or end > len(text):
                self._parts.append(text[at:begin])
                self._tail = text[begin:]
                return None

            if not self._value and mark in self._closings:
                self._parts.append(text[at:begin])
                self._tail = ""
                return mark, text[end:]

            self._parts.append(text[at:end])
            at = end
            if not self._value:
                self._value = mark
            elif mark != "\\":
                self._value = ""

    def body(self) -> str:
        return "".join(self._parts) + self._tail


def _value_end(begin: str, end: str) -> MarkFinder:
    marks = [end]
    if begin in ("'", '"'):
        marks.append("\\")
    return MarkFinder(marks)
