"""The choices of a person at `status --watch`: search, order, row, details and help. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, Final

from rkcached.api import words
from rkcached.plan.vocabulary import urgency


class Press(Enum):
    """A key that does something, whatever its bytes are."""

    UP = auto()
    DOWN = auto()
    PAGE_UP = auto()
    PAGE_DOWN = auto()
    TOP = auto()
    BOTTOM = auto()
    SEARCH = auto()
    SORT = auto()
    OPEN = auto()
    BACK = auto()
    HELP = auto()
    QUIT = auto()


_KEYS: Final[dict[bytes, Press]] = {
    **dict.fromkeys((b"k", b"\x1b[A", b"\x1bOA"), Press.UP),
    **dict.fromkeys((b"j", b"\x1b[B", b"\x1bOB"), Press.DOWN),
    **dict.fromkeys((b"\x1b[5~",), Press.PAGE_UP),
    **dict.fromkeys((b" ", b"\x1b[6~"), Press.PAGE_DOWN),
    **dict.fromkeys((b"g", b"\x1b[H", b"\x1bOH", b"\x1b[1~", b"\x1b[7~"), Press.TOP),
    **dict.fromkeys((b"G", b"\x1b[F", b"\x1bOF", b"\x1b[4~", b"\x1b[8~"), Press.BOTTOM),
    b"/": Press.SEARCH,
    b"s": Press.SORT,
    **dict.fromkeys((b"\r", b"\n"), Press.OPEN),
    b"\x1b": Press.BACK,
    **dict.fromkeys((b"?", b"h"), Press.HELP),
    **dict.fromkeys((b"q", b"Q"), Press.QUIT),
}

HELP: Final = {
    "arrows, j k": "choose a prompt",
    "PgUp PgDn, Home End": "go by pages, to the first and the last",
    "Enter": "show all about the prompt that is chosen",
    "/": "search: each word is in a name, a state, a description or a reason",
    "s": "sort by the next column",
    "Esc": "go back; in the list, end the search",
    "? h": "show the keys, or the list again",
    "q, Ctrl-C": "end",
}
"""The keys and what they do."""

_RUBOUT = (b"\x7f", b"\x08")
_RUBOUT_ALL = b"\x15"

_MOST_LETTERS = 200


def _figure(name: str) -> Callable[[dict[str, Any]], float]:
    """A figure of a prompt's cache, the largest first, and last what has none."""
    return lambda prompt: -(prompt.get("artifact") or {}).get(name, -1.0)


_ORDERS: Final[dict[str, Callable[[dict[str, Any]], Any]]] = {
    "urgency": lambda prompt: urgency(prompt["state"]),
    "prompt": words.name_of,
    "tokens": _figure("tokens"),
    "size": _figure("size_bytes"),
    "cold": _figure("cold_ttft_ms"),
    "warm": _figure("warm_ttft_ms"),
    "hits": lambda prompt: -prompt["hits"],
}
"""The orders of the list; within equal prompts the manifest's order stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Browsing:
    query: str = ""
    order: str = "urgency"
    typing: bool = False
    """Letters go to the search."""
    chosen: str = ""
    """The prompt that is chosen; empty: the first."""
    at: int = 0
    """Its row, from 0, which stays if the prompt goes."""
    first: int = 0
    """The row at the top of the list as it was drawn last."""
    opened: bool = False
    """All about the chosen prompt is shown in place of the list."""
    help: bool = False

    def rows(self, prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The prompts that fit the search, in order."""
        wanted = self.query.casefold().split()
        fitting = [prompt for prompt in prompts if _fits(prompt, wanted)]
        return sorted(fitting, key=_ORDERS[self.order])

    def row_in(self, rows: Sequence[dict[str, Any]]) -> int:
        """The row that is chosen now, from 0."""
        if self.chosen:
            for row, prompt in enumerate(rows):
                if words.name_of(prompt) == self.chosen:
                    return row
        return max(0, min(self.at, len(rows) - 1))

    def pressed(self, key: bytes, rows: Sequence[dict[str, Any]], page: int) -> Browsing | None:
        """The choices after a key; `page`: so many rows are seen. None: it ends."""
        if self.typing:
            return self._typed(key)

        match _KEYS.get(key):
            case None:
                return self
            case Press.QUIT:
                return None
            case Press.SEARCH:
                return replace(self, typing=True, opened=False, help=False)
            case Press.SORT:
                return self._sorted()
            case Press.OPEN:
                return replace(self._at(self.row_in(rows), rows), opened=bool(rows), help=False)
            case Press.BACK:
                return self._back()
            case Press.HELP:
                return replace(self, help=not self.help)
            case press:
                return self._moved(press, rows, page)

    def _moved(self, press: Press, rows: Sequence[dict[str, Any]], page: int) -> Browsing:
        match press:
            case Press.UP:
                return self._at(self.row_in(rows) - 1, rows)
            case Press.DOWN:
                return self._at(self.row_in(rows) + 1, rows)
            case Press.PAGE_UP:
                return self._page(self.first - page, rows)
            case Press.PAGE_DOWN:
                return self._page(self.first + page, rows)
            case Press.TOP:
                return self._at(0, rows)
            case _:
                return self._at(len(rows) - 1, rows)

    def _sorted(self) -> Browsing:
        names = list(_ORDERS)
        following = names[(names.index(self.order) + 1) % len(names)]
        return replace(self, order=following, chosen="", at=0)

    def _at(self, row: int, rows: Sequence[dict[str, Any]]) -> Browsing:
        if not rows:
            return self
        at = max(0, min(row, len(rows) - 1))
        return replace(self, chosen=words.name_of(rows[at]), at=at)

    def _page(self, first: int, rows: Sequence[dict[str, Any]]) -> Browsing:
        """From this row on; it is chosen."""
        return replace(self._at(first, rows), first=max(0, first))

    def _back(self) -> Browsing:
        if self.help:
            return replace(self, help=False)
        if self.opened:
            return replace(self, opened=False)
        return replace(self, query="")

    def _typed(self, key: bytes) -> Browsing:
        if _KEYS.get(key) is Press.OPEN:
            return replace(self, typing=False)
        if _KEYS.get(key) is Press.BACK:
            return replace(self, typing=False, query="")

        query = self.query
        letter = key.decode(errors="ignore")
        if key in _RUBOUT:
            query = query[:-1]
        elif key == _RUBOUT_ALL:
            query = ""
        elif letter.isprintable():
            query = (query + letter)[:_MOST_LETTERS]
        return replace(self, query=query, chosen="", at=0)


def _fits(prompt: dict[str, Any], wanted: Sequence[str]) -> bool:
    if not wanted:
        return True
    parts = (words.name_of(prompt), words.state_of(prompt), prompt["description"], prompt["reason"])
    text = "\n".join(parts).casefold()
    return all(word in text for word in wanted)
