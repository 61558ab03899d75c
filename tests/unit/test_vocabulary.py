"""One table of words for states, answers and plans, which every surface and the documents use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rkcached.plan.fingerprint import fingerprint
from rkcached.plan.records import Action, Adopt, Blocked, Build, Remove, Retire, State
from rkcached.plan.vocabulary import (
    ANSWERS,
    BUILDING,
    LEARNED,
    STATES,
    STEPS,
    Tone,
    step_of,
    tone_of,
    urgency,
)
from rkcached.sources.records import Key

ROOT = Path(__file__).parents[2]
KEY, SOURCE = Key("m", "a"), Key("m", "b")
WANTED = fingerprint({"a": 1})


def test_every_state_has_its_word() -> None:
    """A state that is added needs a colour, a place and a meaning."""
    assert set(STATES) == {*State, BUILDING}
    assert list(STATES) == sorted(STATES, key=urgency)


def test_the_glossary_explains_every_word() -> None:
    """What a person reads on a screen is found there."""
    glossary = (ROOT / "docs/glossary.md").read_text()
    for word in (*STATES, *ANSWERS, "adopted", "renamed", f"{LEARNED} prompt"):
        assert re.search(rf"\*\*{word}\*\*", glossary), word


@pytest.mark.parametrize(
    ("action", "word"),
    [
        (Build(key=KEY, reason="", fingerprint=WANTED), "build"),
        (Adopt(key=KEY, reason="", fingerprint=WANTED, source=SOURCE, take=True), "rename"),
        (Adopt(key=KEY, reason="", fingerprint=WANTED, source=SOURCE), "adopt"),
        (Adopt(key=KEY, reason="", fingerprint=WANTED, take=True), "adopt"),
        (Retire(key=KEY, reason=""), "retire"),
        (Remove(key=KEY, reason=""), "remove"),
        (Blocked(key=KEY, reason=""), "blocked"),
    ],
)
def test_every_action_has_its_word(action: Action, word: str) -> None:
    """To take over the cache of a prompt that is gone is to rename it."""
    assert step_of(action) == word
    assert word in STEPS


def test_an_unknown_state_is_bad_news() -> None:
    """So that it is not overlooked; an answer's state may be that of its prompt."""
    assert tone_of("hit") is tone_of("fresh") is Tone.GOOD
    assert tone_of("stale") is tone_of("partial") is Tone.WARN
    assert tone_of("another") is Tone.BAD
