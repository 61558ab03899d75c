"""Reads values and calls as models write them in the manner of Python, JSON or Gemma. Pure.

`json` cannot read `{'a': True}` or `{a:<|"|>x<|"|>}`, and Python's own parser refuses `f(from="a")`
and may be brought down by deep nesting. So this one is ours: it builds values, evaluates nothing,
and goes no deeper than MAX_DEPTH.
"""

from __future__ import annotations

import re
from typing import Any, Final

MAX_DEPTH: Final = 64

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_WORD = re.compile(r"[^\W\d][\w.-]*")
_KEY = re.compile(r"[^\s:,{}\[\]\"']+")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|U[0-9a-fA-F]{8}|.)", re.DOTALL)

_QUOTED = (
    re.compile(r'"""((?:[^\\]|\\.)*?)"""', re.DOTALL),
    re.compile(r"'''((?:[^\\]|\\.)*?)'''", re.DOTALL),
    re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL),
    re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL),
)
_CONSTANTS: Final = {
    "true": True,
    "True": True,
    "false": False,
    "False": False,
    "null": None,
    "none": None,
    "None": None,
}
_ESCAPES: Final = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "b": "\b",
    "f": "\f",
    "0": "\0",
    "/": "/",
    "\\": "\\",
    '"': '"',
    "'": "'",
    "\n": "",
}


class Literals:
    """A place in a text, and what is read from there. All errors are ValueErrors.

    `quote` is what a model writes on both sides of a string instead of quotation marks, if it does.
    """

    def __init__(self, text: str, at: int = 0, *, quote: str = "") -> None:
        self.text = text
        self.at = at
        self._quote = quote

    def skip(self, characters: str = " \t\r\n") -> None:
        while self.at < len(self.text) and self.text[self.at] in characters:
            self.at += 1

    def take(self, wanted: str) -> bool:
        """Go past white space and `wanted`, if that comes next."""
        self.skip()
        if not self.text.startswith(wanted, self.at):
            return False

        self.at += len(wanted)
        return True

    def need(self, wanted: str) -> None:
        if not self.take(wanted):
            raise ValueError(f"{wanted!r} is missing")

    def word(self) -> str:
        self.skip()
        match = _WORD.match(self.text, self.at)
        if match is None:
            raise ValueError("a name is missing")

        self.at = match.end()
        return match[0]

    def call(self) -> tuple[str, dict[str, Any]]:
        """A call as Python has it, with keywords only: its name and arguments."""
        name = self.word()
        self.need("(")
        arguments: dict[str, Any] = {}
        while not self.take(")"):
            key = self.word()
            self.need("=")
            arguments[key] = self.value()
            self._separate(")")

        return name, arguments

    def value(self, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        if self.take("{"):
            return self._object(depth)
        if self.take("["):
            return self._list("]", depth)
        if self.take("("):
            return self._list(")", depth)

        text = self._string()
        if text is not None:
            return text

        number = _NUMBER.match(self.text, self.at)
        if number is not None:
            self.at = number.end()
            return _number(number[0])

        word = self.word()
        if word not in _CONSTANTS:
            raise ValueError(f"{word!r} is no value")
        return _CONSTANTS[word]

    def _object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self.take("}"):
            key = self._string()
            if key is None:
                key = self._bare_key()
            self.need(":")
            found[key] = self.value(depth + 1)
            self._separate("}")

        return found

    def _list(self, end: str, depth: int) -> list[Any]:
        found = []
        while not self.take(end):
            found.append(self.value(depth + 1))
            self._separate(end)

        return found

    def _separate(self, end: str) -> None:
        """A comma, unless the end comes next."""
        if not self.take(",") and not self.text.startswith(end, self.at):
            raise ValueError("a comma is missing")

    def _bare_key(self) -> str:
        match = _KEY.match(self.text, self.at)
        if match is None:
            raise ValueError("a key is missing")

        self.at = match.end()
        return match[0]

    def _string(self) -> str | None:
        self.skip()
        if self._quote and self.text.startswith(self._quote, self.at):
            begin = self.at + len(self._quote)
            end = self.text.find(self._quote, begin)
            if end < 0:
                raise ValueError("a string does not end")

            self.at = end + len(self._quote)
            return self.text[begin:end]

        if not self.text.startswith(("'", '"'), self.at):
            return None
        for pattern in _QUOTED:
            match = pattern.match(self.text, self.at)
            if match is not None:
                self.at = match.end()
                return _unescaped(match[1])
        raise ValueError("a string does not end")


def _number(text: str) -> int | float:
    if text.lstrip("+-").isdigit():
        return int(text)
    return float(text)


def _unescaped(text: str) -> str:
    if "\\" not in text:
        return text

    plain = _ESCAPE.sub(_character, text)
    # Two escapes may be the halves of one character.
    return plain.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _character(match: re.Match[str]) -> str:
    escape = match[1]
    if len(escape) > 1:
        return chr(int(escape[1:], 16))
    return _ESCAPES.get(escape, match[0])
