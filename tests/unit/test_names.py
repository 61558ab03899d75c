"""Names of prompts on the command line, and what a wrong one is answered with."""

from __future__ import annotations

import pytest

from rkcached.cli.names import matching
from rkcached.errors import SourceError
from rkcached.sources.names import MAX_LISTED, hint_for
from rkcached.sources.records import Key

MANY = [f"m/prompt{number:04d}" for number in range(10_000)]


def test_few_names_are_all_listed() -> None:
    assert hint_for("m/c", ["m/a", "m/b"]) == "known: m/a, m/b"
    assert hint_for("m/c", []) == "known: none"


def test_of_many_names_the_most_similar_are_listed() -> None:
    """Ten thousand names on a terminal help nobody."""
    hint = hint_for("m/prompt00420", MANY)
    assert hint.startswith("did you mean 'm/prompt0420'? known: m/prompt0420, m/prompt0042, ")
    assert hint.endswith(f" and {10_000 - MAX_LISTED:,} more")
    assert len(hint) < 300
    assert hint_for("\x00", MANY).startswith("known: m/prompt0000, m/prompt0001, ")


def test_a_wrong_name_of_many() -> None:
    with pytest.raises(SourceError) as error:
        matching(["m/prompt00420"], [Key("m", name[2:]) for name in MANY])
    assert len(error.value.hint) < 300
