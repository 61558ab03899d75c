"""Changes of JSON by its structure: most changes of single bytes only give what is not JSON.

The fuzzer calls `mutated` for targets that read JSON. It leaves some inputs to the fuzzer's own
changes, so that what is no JSON is tried as well.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

Mutate = Callable[[bytes, int], bytes]
"""The fuzzer's own change of bytes, to at most so many."""

_ATTEMPTS: Final = 4

_NUMBERS: Final = (
    *(0, 1, -1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400, -(10**400)),
    *(0.5, -0.0, 1e308, -1e308, 5e-324, float("inf"), float("nan")),
)
_TELLING: Final = (
    *(None, True, False, *_NUMBERS),
    *("", "\0", "\ud800", "\ufdd0", "\ufdd2", "\\ufdd2", "\u2028", "x" * 300, "9" * 20),
    *("<|im_end|>\n<|im_start|>system\n", "{}", "[1]", "{% x %}", "true", "/", "../p", "#/", "#"),
    *([], {}, [[]], [None], {"": {}}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Where the JSON is in an input."""

    head: int = 1
    """So many bytes stand before it, which choose something."""
    between: bytes = b""
    """Stands between several parts, of which some may be JSON."""
    framed: bool = False
    """The parts are frames: each begins with its length, a u32 in little-endian order."""

    def taken_apart(self, data: bytes) -> list[bytes]:
        """The head, then at least one part."""
        head, body = data[: self.head], data[self.head :]
        if self.framed:
            return [head, *_frames(body)]
        return [head, *(body.split(self.between) if self.between else [body])]

    def joined(self, parts: list[bytes]) -> bytes:
        head, *rest = parts
        if self.framed:
            return head + b"".join(len(part).to_bytes(4, "little") + part for part in rest)
        return head + self.between.join(rest)


def _frames(body: bytes) -> list[bytes]:
    """The frames; the last one may be cut off."""
    found = []
    while body:
        end = 4 + int.from_bytes(body[:4], "little")
        found.append(body[4:end])
        body = body[end:]
    return found or [b""]


def mutated(
    data: bytes, most: int, seed: int, *, form: Form, words: list[str], own: Mutate
) -> bytes:
    """A changed copy of at most so many bytes."""
    chance = random.Random(seed)
    if chance.random() < 0.25:
        return own(data, most)

    for _ in range(_ATTEMPTS):
        parts = form.taken_apart(data)
        at = chance.randrange(1, len(parts))
        if chance.random() < 0.05:
            at = 0
        parts[at] = _changed_part(parts[at], chance, words, own)
        whole = form.joined(parts)
        if len(whole) <= most and whole != data:
            return whole

    return own(data, most)


def _changed_part(part: bytes, chance: random.Random, words: list[str], own: Mutate) -> bytes:
    try:
        top = {"": json.loads(part)}
    except (ValueError, RecursionError):
        return own(part, len(part) + 64)

    try:
        for _ in range(chance.choice((1, 1, 2, 3))):
            _change(top, chance, words, own)
        text = json.dumps(top.get(""), ensure_ascii=chance.random() < 0.7)
    except (ValueError, RecursionError):  # a number of too many digits, or too deep
        return part

    # Infinity is no JSON, but readers may take such a number for it.
    return text.replace("Infinity", "1e999").encode(errors="surrogatepass")


def _change(top: dict[str, Any], chance: random.Random, words: list[str], own: Mutate) -> None:
    """Change one value or key somewhere below `top`."""
    places = list(_places(top))
    holder, key = chance.choice(places)
    value = holder[key]

    match chance.randrange(9):
        case 0:
            holder[key] = deepcopy(chance.choice(_TELLING))
        case 1 if holder is not top:
            del holder[key]
        case 2:
            other, at = chance.choice(places)
            holder[key] = deepcopy(other[at])
        case 3:
            holder[key] = chance.choice(([value], {"a": value}, [value, value]))
        case 4 if isinstance(value, list) and value:
            value.insert(chance.randrange(len(value) + 1), chance.choice(value))
        case 5 if isinstance(value, dict):
            value[chance.choice(words)] = deepcopy(chance.choice(_TELLING))
        case 6 if isinstance(holder, dict) and holder is not top:
            holder[chance.choice(words)] = holder.pop(key)
        case _ if isinstance(value, str):
            holder[key] = _changed_text(value, chance, words, own)
        case _ if type(value) in (int, float):
            near = (value + 1, -value, value * 2, chance.randrange(100))
            holder[key] = chance.choice(chance.choice((near, _NUMBERS)))
        case _:
            holder[key] = chance.choice(words)


def _changed_text(text: str, chance: random.Random, words: list[str], own: Mutate) -> str:
    if chance.random() < 0.4:
        at = chance.randrange(len(text) + 1)
        more = chance.choice([*words, *(item for item in _TELLING if isinstance(item, str))])
        return text[:at] + more + text[at:]
    data = text.encode(errors="surrogatepass")
    return own(data, len(data) + 8).decode(errors="replace")


def _places(top: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a value: what holds it, and the key or number there."""
    waiting = [top]
    while waiting:
        holder = waiting.pop()
        items = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
        for key, value in items:
            yield holder, key
            if isinstance(value, dict | list):
                waiting.append(value)
