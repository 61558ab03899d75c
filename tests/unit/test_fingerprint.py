"""The identity of a prompt cache.

Its encoding is frozen, its order free, and a difference is told by name.
"""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkcached.plan.fingerprint import Change, Value, changes, fingerprint, reason_of

FULL: dict[str, Value] = {
    "engine": "memory",
    "params.temperature": 0.8,
    "params.top_k": 40,
    "params.repeat_penalty": 1.0,
    "prefix.digest": "ab" * 32,
    "template": "Zürich 🎉",
    "thinking": None,
}

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
)
COMPONENTS = st.dictionaries(TEXTS, TEXTS, max_size=5)


def independent(texts: dict[str, str]) -> str:
    """The documented encoding, written a second time."""
    data = b"rkcached fingerprint\0" + struct.pack("<I", 1)
    for name in sorted(texts, key=str.encode):
        for part in (name.encode(), texts[name].encode()):
            data += struct.pack("<Q", len(part)) + part
    return hashlib.sha256(data).hexdigest()


def digest(**components: Value) -> str:
    return fingerprint(components).digest


def test_no_components_have_a_frozen_digest() -> None:
    """A change of magic or version makes every prompt cache stale.

    So it must not happen unnoticed.
    """
    assert digest() == "1f3ff4c0bb6a2b96ed5775c583f74da7c620de7a877a2b6823931d00988071e0"


def test_a_full_set_has_a_frozen_digest() -> None:
    """Names, numbers, text beyond ASCII, and a value that is not set."""
    assert (
        fingerprint(FULL).digest
        == "026ccb09ebbe2100dd154b992fc75bd10b41eae59ec96a16b5217e95edffea80"
    )


def test_the_encoding_is_the_documented_one() -> None:
    """Canonical texts, sorted, each with its length."""
    texts = {
        "engine": "memory",
        "params.temperature": "0.8",
        "params.top_k": "40",
        "params.repeat_penalty": "1",
        "prefix.digest": "ab" * 32,
        "template": "Zürich 🎉",
        "thinking": "unset",
    }
    assert independent(texts) == fingerprint(FULL).digest
    assert texts == dict(fingerprint(FULL).components)


@given(COMPONENTS)
def test_any_texts_are_encoded_as_documented(components: dict[str, str]) -> None:
    """Byte order of the names, whatever characters they have."""
    assert independent(components) == fingerprint(components).digest


@given(st.dictionaries(TEXTS, VALUES, max_size=5))
def test_components_are_a_fixed_point(components: dict[str, Value]) -> None:
    """The texts kept in a sidecar have the very fingerprint that they were made with."""
    made = fingerprint(components)
    assert made.digest == fingerprint(made.components).digest


@given(st.permutations(list(FULL.items())))
def test_order_does_not_matter(items: list[tuple[str, Value]]) -> None:
    """A mapping has no order, so neither has a fingerprint."""
    assert fingerprint(FULL).digest == fingerprint(dict(items)).digest


@given(COMPONENTS, COMPONENTS)
def test_different_components_differ(left: dict[str, str], right: dict[str, str]) -> None:
    """Equal digests mean equal components, and the other way round."""
    assert (left == right) == (fingerprint(left).digest == fingerprint(right).digest)


@given(TEXTS, TEXTS.filter(bool), TEXTS)
def test_bytes_cannot_move_between_name_and_value(name: str, moved: str, value: str) -> None:
    """The lengths keep ("ab", "c") apart from ("a", "bc")."""
    assert fingerprint({name + moved: value}).digest != fingerprint({name: moved + value}).digest


@pytest.mark.parametrize(
    ("left", "right"),
    [(1, 1.0), (-0.0, 0), (0.5, 5e-1), (1e16, 10**16)],
    ids=["one", "minus-zero", "half", "large"],
)
def test_equal_numbers_are_one_value(left: Value, right: Value) -> None:
    """Whether YAML said 1 or 1.0 is no difference."""
    assert digest(x=left) == digest(x=right)


@pytest.mark.parametrize(
    ("left", "right"),
    [(True, 1), (False, 0), (None, ""), (None, False), (0.7, 0.7000000000000001), ("é", "e\u0301")],
    ids=["true", "false", "none-empty", "none-false", "next-float", "unnormalised"],
)
def test_different_values_differ(left: Value, right: Value) -> None:
    """True is not 1, nothing is not empty, a float counts to its last bit.

    Text is taken as it is.
    """
    assert digest(x=left) != digest(x=right)


def test_an_absent_component_is_not_an_unset_one() -> None:
    """A component that a later version adds changes the fingerprint even while it is not set."""
    assert digest() != digest(x=None)


def test_a_fingerprint_is_shown_short() -> None:
    """Twelve digits are enough for a person."""
    made = fingerprint(FULL)
    assert made.digest[:12] == str(made)


def test_components_cannot_be_changed() -> None:
    """Whoever holds a fingerprint cannot make it lie."""
    with pytest.raises(TypeError):
        fingerprint(FULL).components["engine"] = "other"  # type: ignore[index]


def test_changes_name_what_differs_in_order() -> None:
    """Old and new of each, sorted by name; what is equal is left out."""
    old = {"b": "1", "a": "x", "same": "s"}
    new = {"b": "2", "c": "y", "same": "s"}
    expected = (
        Change(component="a", old="x", new=None),
        Change(component="b", old="1", new="2"),
        Change(component="c", old=None, new="y"),
    )
    assert expected == changes(old, new)
    assert [str(change) for change in expected] == ["a: x -> absent", "b: 1 -> 2", "c: absent -> y"]


def test_equal_components_have_no_changes() -> None:
    """Nothing differs, nothing is said."""
    assert changes({"a": "1"}, {"a": "1"}) == ()


def test_digests_are_shortened_and_nothing_else_is() -> None:
    """64 hexadecimal digits are a digest; a long text or 63 digits are not."""
    change = Change(component="x", old="0123456789abcdef" * 4, new="0123456789ABCDEF" * 4)
    assert str(change) == "x: 0123456789ab -> " + "0123456789ABCDEF" * 4
    assert f"x: {'a' * 63} -> absent" == str(Change(component="x", old="a" * 63, new=None))


def test_a_reason_names_a_changed_text_once() -> None:
    """Its size and digest are no words for a reader; other components are told as they are."""
    old = {"params.top_k": "1", "prefix.bytes": "706", "prefix.digest": "ab"}
    new = {"params.top_k": "2", "prefix.bytes": "940", "prefix.digest": "cd"}

    assert reason_of(changes(old, new)) == "params.top_k: 1 -> 2, its text changed"
