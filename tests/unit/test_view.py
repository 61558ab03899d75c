"""The index of fresh artifacts: the longest prefix wins, and what is discarded is gone."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rkcached.reconcile.snapshot import FreshIndex
from rkcached.sources.records import Key
from rkcached.store.sidecar import Figures, Sidecar, StoredArtifact

FIGURES = Figures(prefill_ms=2.0, load_ms=1.0, cold_ttft_ms=3.0, warm_ttft_ms=1.5, verified="exact")
A, B, C = Key("m", "a"), Key("m", "b"), Key("m", "c")


def stored(key: Key, prefix: bytes) -> StoredArtifact:
    sidecar = Sidecar(
        model=key.model,
        prompt=key.prompt,
        artifact=f"{key.prompt}.memory_cache",
        fingerprint="",
        components={
            "prefix.bytes": str(len(prefix)),
            "prefix.digest": hashlib.sha256(prefix).hexdigest(),
        },
        size_bytes=1,
        sha256="",
        text_sha256="",
        tokens=len(prefix),
        built_at=0.0,
        build_ms=0.0,
        figures=FIGURES,
    )
    return StoredArtifact(folder=Path("/cache"), sidecar=sidecar, signature=None)


def index_of(**prefixes: bytes) -> FreshIndex:
    index = FreshIndex()
    for prompt, prefix in prefixes.items():
        index.add(Key("m", prompt), stored(Key("m", prompt), prefix))
    return index


def test_the_longest_prefix_wins() -> None:
    """Whatever the order in which they were added."""
    assert index_of(b=b"You", a=b"You are", c=b"You are not").longest("m", b"You are kind") == A
    assert index_of(c=b"You are not", a=b"You are", b=b"You").longest("m", b"You are not") == C


def test_a_prefix_may_be_the_whole_request() -> None:
    """One byte less is no match."""
    index = index_of(a=b"You are")
    assert index.longest("m", b"You are") == A
    assert index.longest("m", b"You ar") is None


def test_a_prefix_of_the_same_length_must_have_the_same_text() -> None:
    """Lengths alone say nothing."""
    index = index_of(a=b"You are", b=b"You aXe")
    assert [index.longest("m", text) for text in (b"You are!", b"You aXe!", b"You aYe!")] == [
        A,
        B,
        None,
    ]


def test_another_models_prefix_does_not_count() -> None:
    """A KV state is of one model."""
    assert index_of(a=b"You").longest("n", b"You are") is None


def test_of_two_prompts_with_one_text_either_serves() -> None:
    """When one is discarded the other takes over."""
    for gone, left in ((A, B), (B, A)):
        index = index_of(a=b"You", b=b"You")
        assert index.longest("m", b"You are") in {A, B}
        index.discard(gone)
        assert left == index.longest("m", b"You are")


def test_an_artifact_that_is_added_again_replaces_the_old_one() -> None:
    """Its former text is no longer found."""
    index = index_of(a=b"You")
    index.add(A, stored(A, b"They"))
    assert index.longest("m", b"You are") is None
    assert index.longest("m", b"They are") == A
    assert len(index) == 1


def test_discarding_twice_or_a_stranger_does_nothing() -> None:
    """Idempotent."""
    index = index_of(a=b"You")
    for key in (A, A, B, Key("x", "y")):
        index.discard(key)
    assert (len(index), index.get(A), index.longest("m", b"You")) == (0, None, None)


@given(st.binary(max_size=6), st.lists(st.binary(max_size=4), max_size=6))
def test_the_answer_is_that_of_comparing_every_prefix(text: bytes, prefixes: list[bytes]) -> None:
    """The digests find what `startswith` finds."""
    index = FreshIndex()
    for number, prefix in enumerate(prefixes):
        index.add(Key("m", str(number)), stored(Key("m", str(number)), prefix))
    found = index.longest("m", text)
    expected = max(
        (prefix for prefix in prefixes if text.startswith(prefix)), key=len, default=None
    )
    assert expected == (None if found is None else prefixes[int(found.prompt)])


class IndexMachine(RuleBasedStateMachine):
    """The index against a plain dictionary of texts, over any sequence of changes."""

    def __init__(self) -> None:
        super().__init__()
        self.index = FreshIndex()
        self.naive: dict[Key, bytes] = {}

    @rule(
        model=st.sampled_from("mn"),
        prompt=st.sampled_from("abcd"),
        prefix=st.text("xy", max_size=3),
    )
    def add(self, model: str, prompt: str, prefix: str) -> None:
        key = Key(model, prompt)
        self.naive[key] = prefix.encode()
        self.index.add(key, stored(key, prefix.encode()))

    @rule(model=st.sampled_from("mn"), prompt=st.sampled_from("abcd"))
    def discard(self, model: str, prompt: str) -> None:
        self.naive.pop(Key(model, prompt), None)
        self.index.discard(Key(model, prompt))

    @rule(model=st.sampled_from("mn"), text=st.text("xy", max_size=5))
    def longest(self, model: str, text: str) -> None:
        data = text.encode()
        matching = [p for key, p in self.naive.items() if key.model == model and data.startswith(p)]
        found = self.index.longest(model, data)
        assert (found is None) == (not matching)
        if found is not None:
            assert found.model == model
            assert max(matching, key=len) == self.naive[found]

    @invariant()
    def holds_the_same(self) -> None:
        assert len(self.naive) == len(self.index)
        assert all(self.index.get(key) is not None for key in self.naive)


TestIndexMachine = IndexMachine.TestCase
