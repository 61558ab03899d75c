"""What keys do at `status --watch`: search, order, the chosen prompt, its details and the help."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rkcached.api import words
from rkcached.cli.status.browsing import HELP, Browsing
from tests.unit.test_show import a_status, prompt, seen

UP, DOWN, PAGE_UP, PAGE_DOWN = b"\x1b[A", b"\x1b[B", b"\x1b[5~", b"\x1b[6~"
ENTER, ESCAPE = b"\r", b"\x1b"


def cached(name: str, tokens: int, hits: int, **more: Any) -> dict[str, Any]:
    artifact = {
        "tokens": tokens,
        "size_bytes": 1000 * tokens,
        "built_at": 1e9,
        "build_ms": 2000.0,
        "cold_ttft_ms": 10.0 * tokens,
        "warm_ttft_ms": 5.0,
        "verified": "exact",
        "fingerprint": f"f1{name}",
        "imported": None,
    }
    return prompt(name, "fresh", artifact=artifact, hits=hits, last_used=2e9, **more)


PROMPTS = [
    cached("cook", 300, 1, description="of a ship"),
    prompt("new", "missing", "missing"),
    cached("keeper", 2000, 7, tools=["light", "horn"]),
    prompt("empty", "blocked", "the prompt is empty", hint="write its text"),
]


def after(*keys: bytes, page: int = 2, browsing: Browsing | None = None) -> Browsing:
    """What was chosen by these keys."""
    now = browsing or Browsing()
    for key in keys:
        pressed = now.pressed(key, now.rows(PROMPTS), page)
        assert pressed is not None
        now = pressed
    return now


def names(browsing: Browsing) -> list[str]:
    return [one["prompt"] for one in browsing.rows(PROMPTS)]


def screen(browsing: Browsing) -> list[str]:
    return seen(a_status(PROMPTS), browsing=browsing)


def typed(text: str) -> list[bytes]:
    return [letter.encode() for letter in text]


def test_blocked_prompts_are_first() -> None:
    """Then what is about to be built, then the others in the manifest's order."""
    assert names(Browsing()) == ["empty", "new", "cook", "keeper"]


def test_each_press_sorts_by_the_next_column() -> None:
    """The largest figure comes first, what has none last; after the last column it begins anew."""
    orders = {}
    browsing = Browsing()
    for _ in range(7):
        browsing = after(b"s", browsing=browsing)
        orders[browsing.order] = names(browsing)
    assert orders == {
        "prompt": ["cook", "empty", "keeper", "new"],
        "tokens": ["keeper", "cook", "new", "empty"],
        "size": ["keeper", "cook", "new", "empty"],
        "cold": ["keeper", "cook", "new", "empty"],
        "warm": ["cook", "keeper", "new", "empty"],
        "hits": ["keeper", "cook", "new", "empty"],
        "urgency": ["empty", "new", "cook", "keeper"],
    }
    assert screen(after(b"s", b"s"))[-1] == "sorted by tokens, ? for keys"


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("KEEP", ["keeper"]),
        ("ship of", ["cook"]),
        ("fresh", ["cook", "keeper"]),
        ("the empty", ["empty"]),
        ("nothing", []),
        ("jqs?", []),
    ],
)
def test_a_search(search: str, found: list[str]) -> None:
    """Its words are in names, states, descriptions and reasons; keys that do things are letters."""
    browsing = after(b"/", *typed(search))
    assert names(browsing) == found
    assert screen(browsing)[-1] == f"/{search}_  Enter keeps the search, Esc ends it"
    kept = after(ENTER, browsing=browsing)
    assert not kept.typing
    assert screen(kept)[-1] == f"{len(found)} of 4 fit /{search}, ? for keys"
    assert after(ESCAPE, browsing=kept) == replace(kept, query="")
    assert after(ESCAPE, browsing=browsing).query == ""


def test_a_search_is_corrected() -> None:
    """By the key for it, letter by letter or at once; other keys are no letters of it."""
    browsing = after(b"/", *typed("gr\u00f6\u00dfe"), b"\x7f", b"\x08", UP, b"\xff", b"\x01")
    assert browsing.query == "gr\u00f6"
    assert after(b"\x15", browsing=browsing).query == ""


def test_a_prompt_stays_chosen() -> None:
    """Whatever is above it by now; where it is gone, its row is."""
    browsing = after(DOWN, DOWN)
    assert browsing.chosen == "m/cook"
    assert browsing.row_in(browsing.rows(PROMPTS)) == 2
    fresh = [one | {"state": "fresh"} for one in PROMPTS]
    assert browsing.row_in(browsing.rows(fresh)) == 0
    assert browsing.row_in(browsing.rows(PROMPTS[1:])) == 2
    assert after(UP, UP, UP, UP).at == 0
    assert after(b"G", DOWN).chosen == "m/keeper"
    assert after(b"G", b"g").chosen == "m/empty"
    assert after(PAGE_DOWN).chosen == "m/cook"
    assert after(PAGE_DOWN, PAGE_UP).chosen == "m/empty"
    nothing = after(b"/", *typed("nothing"), ENTER, DOWN, PAGE_DOWN, b"G", ENTER)
    assert not nothing.opened


def test_a_prompts_details() -> None:
    """All that is known of it, by Enter; Esc goes back to the list."""
    opened = after(b"G", ENTER)
    lines = screen(opened)
    for line in (
        "m/keeper: fresh",
        "its prompt cache is of the present text and is used",
        "tools      light, horn",
        "cache      2,000 tokens, 2.0 MB",
        f"built      {words.when(1e9)}, in 2 s",
        "TTFT       20,000 ms cold, 5 ms warm (verified: exact)",
        "identity   f1keeper",
        "hits       7",
        f"last used  {words.when(2e9)}",
        "Esc: the list",
    ):
        assert line in lines
    assert not any("m/cook" in line for line in lines)
    assert not after(ESCAPE, browsing=opened).opened
    blocked = screen(after(ENTER))
    assert "reason     the prompt is empty" in blocked
    assert "next step  write its text" in blocked
    assert "m/cook: fresh" in screen(after(UP, browsing=opened))


def test_the_keys_are_listed() -> None:
    """Both ? and Esc go back."""
    lines = screen(after(b"?"))
    assert all(any(line.startswith(keys) for line in lines) for keys in HELP)
    assert not after(b"?", b"?").help
    assert not after(b"?", ESCAPE).help


@pytest.mark.parametrize("width", [20, 80])
@pytest.mark.parametrize("height", [5, 10, 24])
@pytest.mark.parametrize("keys", [(), (ENTER,), (b"?",), (b"/", b"x")])
def test_each_view_fits(width: int, height: int, keys: tuple[bytes, ...]) -> None:
    """However small the terminal is."""
    long = prompt("p" * 60, "blocked", "reason " * 60, description="d " * 99, tools=["t" * 90] * 9)
    lines = seen(a_status([long, *PROMPTS]), width, height, browsing=after(*keys))
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_q_ends_it() -> None:
    """But while somebody types, it is a letter."""
    assert Browsing().pressed(b"q", [], 1) is None
    assert after(b"/", b"q").query == "q"
    assert after(b"x") == Browsing()
