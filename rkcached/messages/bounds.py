"""How much JSON a request may bring, counted without parsing it. Pure.

Parsing and validation run on the event loop, and cost some microseconds a value: millions of values
in a body of some megabytes would hold everybody else up for seconds.
"""

from __future__ import annotations

import re
from typing import Any

MAX_VALUES = 32_768
"""Values and keys of a body: two thousand messages with calls, or the schemas of two hundred tools.
"""

MAX_TOKEN_IDS = 300_000
"""Of all inputs of one request for embeddings; OpenAI's own limit."""

MAX_ARGUMENTS_CHARACTERS = 256 << 10
"""Of all earlier tool calls of one request: more than any context of a small model holds."""

MAX_DEPTH = 32
"""Of the JSON that reaches a template: what works on it calls itself for each level."""

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"')
_MARKS = (b",", b":", b"[", b"{")


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects stand in each other to a greater depth."""
    inside = [value]
    for _ in range(levels + 1):
        nested: list[Any] = []
        for item in inside:
            if isinstance(item, dict):
                nested += item.values()
            elif isinstance(item, list):
                nested += item

        if not nested:
            return False
        inside = nested

    return True


class ValueCounter:
    """Counts the values and keys of a JSON text that arrives in parts.

    The count is that of commas, colons and opening brackets outside of strings, hence hardly ever
    less than the number of values. A text that is not JSON gets some number, and is refused by the
    parser later.
    """

    def __init__(self) -> None:
        self.count = 0
        self._in_string = False
        self._escaped = False  # the last part ended with the first half of an escape

    def feed(self, part: bytes) -> None:
        if not part:
            return

        if self._escaped:
            part = part[1:]

        if b"\\" in part:
            part = _ESCAPE.sub(b"", part)
        self._escaped = part.endswith(b"\\")

        if self._in_string:
            part = b'"' + part
        outside, quote, _ = _STRING.sub(b"", part).partition(b'"')
        self._in_string = bool(quote)

        for mark in _MARKS:
            self.count += outside.count(mark)


class ArgumentsBudget:
    """Bounds the arguments of all earlier tool calls of one request: they are JSON within JSON."""

    def __init__(self) -> None:
        self._characters = 0
        self._values = 0

    def spend(self, arguments: str) -> None:
        """Errors: ValueError when it is too much."""
        self._characters += len(arguments)
        if self._characters > MAX_ARGUMENTS_CHARACTERS:
            raise ValueError(
                f"the arguments of all calls have more than {MAX_ARGUMENTS_CHARACTERS:,} characters"
            )

        counter = ValueCounter()
        counter.feed(arguments.encode(errors="surrogatepass"))
        self._values += counter.count
        if self._values > MAX_VALUES:
            raise ValueError(
                f"the arguments of all calls have more than {MAX_VALUES:,} values and keys"
            )
