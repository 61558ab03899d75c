"""Which beginnings are suggested, against a count of every one by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkcached.serving import repeats
from rkcached.serving.repeats import AFTER, BLOCK, Noted, Repeats, Suggestion, sizes

KEY = b"k" * 16


def noted(text: bytes, **fields: int) -> Noted:
    """A request of a token for each four bytes, each of which takes 1 ms."""
    tokens = len(text) // 4
    prefilled = len(text) - fields.get("reused_bytes", 0)
    return Noted(rendered=text, prompt_tokens=tokens, prefill_ms=prefilled / 4, **fields)


def suggest(*requests: Noted, after: int = AFTER) -> list[Suggestion]:
    known = Repeats(KEY)
    for request in requests:
        known.note("m", 1, request)
    return known.suggestions(after=after)


class Counted(NamedTuple):
    size: int
    requests: int
    prefilled: int


def by_hand(requests: Sequence[Noted]) -> set[Counted]:
    """Each text that is noted is compared with each request."""
    with_it: dict[bytes, frozenset[int]] = {}
    for request in requests:
        for size in sizes(len(request.rendered), request.system_bytes):
            text = request.rendered[:size]
            with_it[text] = frozenset(
                number
                for number, other in enumerate(requests)
                if other.rendered.startswith(text)
                and size in sizes(len(other.rendered), other.system_bytes)
            )

    found = set()
    for text, numbers in with_it.items():
        prefilled = [n for n in numbers if len(text) >= requests[n].reused_bytes + BLOCK]
        is_part = any(
            len(longer) > len(text) and numbers == others for longer, others in with_it.items()
        )
        if len(numbers) >= AFTER and len(prefilled) >= 2 and not is_part:
            found.add(Counted(len(text), len(numbers), len(prefilled)))
    return found


@st.composite
def conversations(draw: st.DrawFn) -> list[Noted]:
    """Requests made of few long pieces, so that many begin alike."""
    pieces = [letter * length for letter in (b"a", b"b") for length in (100, 256, 400)]
    requests = []
    for _ in range(draw(st.integers(0, 12))):
        head = b"".join(draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=3)))
        rest = b"".join(draw(st.lists(st.sampled_from(pieces), max_size=2)))
        # What follows a system message is a mark that the message itself cannot have.
        text = head + b"<end>" + rest
        reused = draw(st.integers(0, len(text)))
        requests.append(noted(text, reused_bytes=reused, system_bytes=len(head)))
    return requests


@settings(deadline=None, max_examples=200)
@given(conversations())
def test_suggestions_are_those_of_a_count_by_hand(requests: list[Noted]) -> None:
    """None is missing, none is too many, and none is counted twice."""
    found = suggest(*requests)
    shown = [Counted(s.size_bytes, s.requests, s.prefilled) for s in found]
    assert set(shown) == by_hand(requests)
    assert len({s.id for s in found}) == len(found)


def test_the_third_time_makes_a_suggestion() -> None:
    """With its tokens and its time, without what differs."""
    head = b"s" * 1000
    requests = [noted(head + letter * 1000, system_bytes=1000) for letter in (b"a", b"b", b"c")]
    assert suggest(*requests[:2]) == []
    (found,) = suggest(*requests)
    assert (found.size_bytes, found.tokens, found.requests, found.prefilled) == (1000, 250, 3, 3)
    assert found.prefill_ms == pytest.approx(250)
    assert not found.beyond_system


def test_what_was_in_memory_costs_nothing() -> None:
    """A conversation that goes on is no reason to declare anything."""
    text = b"s" * 2000
    first, *others = [noted(text + b"a" * 300 * turn, reused_bytes=0) for turn in range(1, 6)]
    on = [other._replace(reused_bytes=len(other.rendered) - 300) for other in others]
    assert suggest(first, *on) == []


def test_only_what_is_prefilled_again_counts() -> None:
    """A date line after a declared prompt is not worth a prompt of its own."""
    text = b"d" * 3000
    tail = [noted(text + b"x" * 200, reused_bytes=3000, declared_bytes=3000)] * 5
    assert suggest(*tail) == []
    (found,) = suggest(*[noted(text + b"x" * 2000, reused_bytes=3000, declared_bytes=3000)] * 5)
    assert found.prefill_ms == pytest.approx(found.size_bytes / 4 - 750)


def test_what_was_declared_since_is_suggested_no_more() -> None:
    requests = [noted(b"s" * 1000, system_bytes=900)] * 4
    assert suggest(*requests)
    used = noted(b"s" * 1000, system_bytes=900, reused_bytes=900, declared_bytes=900)
    assert suggest(*requests, used) == []


def test_users_and_models_are_apart() -> None:
    """Two who ask the same are not added up, and have different ids."""
    known = Repeats(KEY)
    for owner, model in ((1, "m"), (1, "m"), (2, "m"), (1, "other")):
        known.note(model, owner, noted(b"s" * 1000))
    assert known.suggestions() == []
    known.note("m", 1, noted(b"s" * 1000))
    for _ in range(2):
        known.note("m", 2, noted(b"s" * 1000))
    assert [s.owner for s in known.suggestions(1)] == [1]
    assert known.suggestions(3) == []
    first, second = known.suggestions()
    assert first.id != second.id


def test_the_key_makes_the_ids() -> None:
    """Who knows a text cannot find out whether it was asked."""
    request = noted(b"s" * 1000)
    ids = [{c.id for c in Repeats(key).note("m", 1, request)} for key in (KEY, b"other")]
    assert ids[0]
    assert ids[0].isdisjoint(ids[1])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used goes on being known, and nobody pushes out what is known of another."""
    monkeypatch.setattr(repeats, "MAX_BEGINNINGS", 20)
    monkeypatch.setattr(repeats, "MAX_TABLES", 2)
    known = Repeats(KEY)
    for number in range(100):
        known.note("m", 1, noted(b"%03d" % number * 400))
        if number < 3:
            known.note("m", 2, noted(b"once" * 400))
        known.note("m", 1, noted(b"kept" * 400))
    assert [s.requests for s in known.suggestions(1)] == [100]
    assert [s.requests for s in known.suggestions(2)] == [3]

    known.note("m", 1, noted(b"kept" * 400))
    known.note("m", 3, noted(b"kept" * 400))
    assert known.suggestions(2) == []
    assert [s.requests for s in known.suggestions(1)] == [101]


def test_a_long_request_is_divided_as_far_as_is_useful() -> None:
    """Its system message is noted to its end."""
    assert len(sizes(10_000_000, 0)) == repeats.MAX_BYTES // BLOCK
    assert sizes(10_000_000, 5_000_001)[-1] == 5_000_001
    assert sizes(100, 50) == []
