"""The index of prompt caches: the longest beginning wins, and what is taken out is gone."""

from __future__ import annotations

import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rkcached.engines.prefix import common_bytes
from rkcached.reconcile.index import ArtifactIndex, Match
from rkcached.sources.records import Key
from rkcached.store.sidecar import Figures, Sidecar, StoredArtifact

FIGURES = Figures(prefill_ms=2.0, load_ms=1.0, cold_ttft_ms=3.0, warm_ttft_ms=1.5, verified="exact")
A, B, C = Key("m", "a"), Key("m", "b"), Key("m", "c")


def stored(key: Key, prefix: bytes, owner: int | None = None) -> StoredArtifact:
    sidecar = Sidecar(
        model=key.model,
        prompt=key.prompt,
        artifact=f"{key.prompt}.memory_cache",
        fingerprint="",
        components={} if owner is None else {"owner": str(owner)},
        size_bytes=1,
        sha256="",
        text_sha256="",
        tokens=len(prefix),
        built_at=0.0,
        build_ms=0.0,
        figures=FIGURES,
    )
    return StoredArtifact(folder=Path("/cache"), sidecar=sidecar, signature=None, text=prefix)


def index_of(**prefixes: bytes) -> ArtifactIndex:
    index = ArtifactIndex()
    for prompt, prefix in prefixes.items():
        index = index.with_artifact(Key("m", prompt), stored(Key("m", prompt), prefix))
    return index


def longest(index: ArtifactIndex, model: str, text: bytes) -> Key | None:
    match = index.longest(model, text)
    assert match is None or match.is_whole
    return None if match is None else match.key


def test_the_longest_prefix_wins() -> None:
    """Whatever the order in which they were added."""
    one = index_of(b=b"You", a=b"You are", c=b"You are not")
    assert longest(one, "m", b"You are kind") == A
    other = index_of(c=b"You are not", a=b"You are", b=b"You")
    assert longest(other, "m", b"You are not") == C


def test_what_serves_one_user_is_found_by_nobody_else() -> None:
    """He is served from what is everybody's, too; the longer one of both wins."""
    index = index_of(a=b"You", c=b"You are kin to all")
    index = index.with_artifact(B, stored(B, b"You are kind", owner=7))
    for find in (index.longest, index.closest):
        match = find("m", b"You are kind!", 7)
        assert match is not None
        assert match.key == B
    match = index.longest("m", b"You are kind!")
    assert match is not None
    assert (match.key, index.longest("m", b"You are kind!", 8)) == (A, match)
    match = index.closest("m", b"You are kin to all!", 7)
    assert match is not None
    assert match.key == C
    assert index.outdated(B).closest("m", b"You are kin", 8) == index.closest("m", b"You are kin")

    mine = index.with_artifact(B, stored(B, b"I am", owner=8))
    assert mine.longest("m", b"I am", 7) is None
    assert mine.without(B).longest("m", b"I am", 8) is None


def test_a_prefix_may_be_the_whole_request() -> None:
    """One byte less is no match."""
    index = index_of(a=b"You are")
    assert longest(index, "m", b"You are") == A
    assert longest(index, "m", b"You ar") is None


def test_a_prefix_of_the_same_length_must_have_the_same_text() -> None:
    """Lengths alone say nothing."""
    index = index_of(a=b"You are", b=b"You aXe")
    assert [longest(index, "m", text) for text in (b"You are!", b"You aXe!", b"You aYe!")] == [
        A,
        B,
        None,
    ]


def test_another_models_prefix_does_not_count() -> None:
    """A KV state is of one model."""
    assert longest(index_of(a=b"You"), "n", b"You are") is None


def test_of_two_prompts_with_one_text_either_serves() -> None:
    """When one is taken out the other takes over."""
    for gone, left in ((A, B), (B, A)):
        index = index_of(a=b"You", b=b"You")
        assert longest(index, "m", b"You are") in {A, B}
        index = index.without(gone)
        assert left == longest(index, "m", b"You are")


def test_an_artifact_that_is_added_again_replaces_the_old_one() -> None:
    """Its former text is no longer found."""
    index = index_of(a=b"You")
    index = index.with_artifact(A, stored(A, b"They"))
    assert longest(index, "m", b"You are") is None
    assert longest(index, "m", b"They are") == A
    assert len(index) == 1


def test_taking_out_twice_or_a_stranger_does_nothing() -> None:
    """Idempotent."""
    index = index_of(a=b"You")
    for key in (A, A, B, Key("x", "y")):
        index = index.without(key)
    assert (len(index), index.get(A), longest(index, "m", b"You")) == (0, None, None)


@given(st.binary(max_size=6), st.lists(st.binary(max_size=4), max_size=6))
def test_the_answer_is_that_of_comparing_every_prefix(text: bytes, prefixes: list[bytes]) -> None:
    """The search finds what `startswith` finds."""
    index = ArtifactIndex()
    for number, prefix in enumerate(prefixes):
        key = Key("m", str(number))
        index = index.with_artifact(key, stored(key, prefix))
    found = longest(index, "m", text)
    expected = max(
        (prefix for prefix in prefixes if text.startswith(prefix)), key=len, default=None
    )
    assert expected == (None if found is None else prefixes[int(found.prompt)])


def test_an_index_never_changes() -> None:
    """A request that took one may look at it again later."""
    before = index_of(a=b"You", b=b"You are")
    before.without(B)
    before.with_artifact(C, stored(C, b"You are kind"))
    assert longest(before, "m", b"You are kind") == B
    assert len(before) == 2


@given(st.lists(st.tuples(st.sampled_from("mn"), st.text("xy", max_size=3)), max_size=6))
def test_an_index_made_at_once_is_that_of_adding_one_by_one(texts: list[tuple[str, str]]) -> None:
    """A look makes the first, a build the second."""
    artifacts = {}
    one_by_one = ArtifactIndex()
    for number, (model, text) in enumerate(texts):
        key = Key(model, str(number))
        artifacts[key] = stored(key, text.encode())
        one_by_one = one_by_one.with_artifact(key, artifacts[key])
    at_once = ArtifactIndex(artifacts)
    for model in "mn":
        for request in (b"", b"x", b"xyx", b"yyyy"):
            assert at_once.longest(model, request) == one_by_one.longest(model, request)


def test_the_longest_beginning_is_found_where_no_whole_text_is() -> None:
    """A line more or less in the request leaves what stands before it."""
    index = index_of(a=b"You are a pilot.", b=b"You are a cook.", c=b"They are")
    assert index.closest("m", b"You are a pilgrim") == Match(A, stored(A, b"You are a pilot."), 13)
    assert index.closest("m", b"You are a cow") == Match(B, stored(B, b"You are a cook."), 12)
    assert index.closest("m", b"Who?") is None
    assert index.closest("n", b"You are") is None


def test_an_outdated_artifact_is_close_and_never_whole() -> None:
    """It was made of the text that its prompt had: good for the beginning that both share."""
    index = index_of(a=b"You are", b=b"You").outdated(A)
    assert (len(index), index.get(A)) == (1, None)
    assert longest(index, "m", b"You are kind") == B
    closest = index.closest("m", b"You are kind")
    assert closest is not None
    assert (closest.key, closest.common_bytes) == (A, 7)
    assert index.without(A).closest("m", b"You are kind") == index.longest("m", b"You are kind")
    again = index.with_artifact(A, stored(A, b"You are ki"))
    assert longest(again, "m", b"You are kind") == A


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=40))
def test_the_common_beginning_is_that_of_comparing_byte_by_byte(
    shared: bytes, one: bytes, other: bytes
) -> None:
    """Halving finds the first byte that differs."""
    one, other = shared + one, shared + other
    expected = 0
    while expected < min(len(one), len(other)) and one[expected] == other[expected]:
        expected += 1
    assert common_bytes(one, other) == expected


def test_a_search_among_ten_thousand_prompts_takes_less_than_a_millisecond() -> None:
    """At the 99th percentile of requests of 10 kB that share all but their end with a prompt."""
    house = b"You follow the rules of this house. " * 150
    artifacts = {}
    for number in range(10_000):
        key = Key("m", f"p{number}")
        artifacts[key] = stored(
            key, house + f"You are number {number * 7919 % 10_000:05}.".encode()
        )
    index = ArtifactIndex(artifacts)
    took = []
    for number in range(300):
        request = (
            house + f"You are number {number * 31:05}. Today is Friday.".encode() + b"x" * 4000
        )
        started = time.thread_time()  # others use the machine, too
        closest, whole = index.closest("m", request), index.longest("m", request)
        took.append(time.thread_time() - started)
        assert closest is not None
        assert whole is not None
        assert closest.common_bytes >= whole.common_bytes > len(house)
    assert sorted(took)[len(took) * 99 // 100] < 0.001


class IndexMachine(RuleBasedStateMachine):
    """The index against a plain dictionary of texts, over any sequence of changes."""

    def __init__(self) -> None:
        super().__init__()
        self.index = ArtifactIndex()
        self.naive: dict[Key, bytes] = {}

    @rule(
        model=st.sampled_from("mn"),
        prompt=st.sampled_from("abcd"),
        prefix=st.text("xy", max_size=3),
    )
    def add(self, model: str, prompt: str, prefix: str) -> None:
        key = Key(model, prompt)
        self.naive[key] = prefix.encode()
        self.index = self.index.with_artifact(key, stored(key, prefix.encode()))

    @rule(model=st.sampled_from("mn"), prompt=st.sampled_from("abcd"))
    def discard(self, model: str, prompt: str) -> None:
        self.naive.pop(Key(model, prompt), None)
        self.index = self.index.without(Key(model, prompt))

    @rule(model=st.sampled_from("mn"), text=st.text("xy", max_size=5))
    def longest(self, model: str, text: str) -> None:
        data = text.encode()
        matching = [p for key, p in self.naive.items() if key.model == model and data.startswith(p)]
        found = longest(self.index, model, data)
        assert (found is None) == (not matching)
        if found is not None:
            assert found.model == model
            assert max(matching, key=len) == self.naive[found]

    @rule(model=st.sampled_from("mn"), text=st.text("xy", max_size=5))
    def closest(self, model: str, text: str) -> None:
        data = text.encode()
        lengths = [common_bytes(p, data) for key, p in self.naive.items() if key.model == model]
        found = self.index.closest(model, data)
        assert max(lengths, default=0) == (0 if found is None else found.common_bytes)
        if found is not None:
            assert common_bytes(self.naive[found.key], data) == found.common_bytes

    @invariant()
    def holds_the_same(self) -> None:
        assert len(self.naive) == len(self.index)
        assert all(self.index.get(key) is not None for key in self.naive)


TestIndexMachine = IndexMachine.TestCase
