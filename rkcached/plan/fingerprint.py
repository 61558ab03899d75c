"""The identity of a prompt cache: a hash of everything that its bytes depend on.

A fingerprint is SHA-256 over named components in one canonical encoding. The components travel with
it (they are kept in the sidecar), so two fingerprints that differ can say in which component. Names
of models and prompts and times of files are never components: renaming or touching a file changes
nothing.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rkcached.worker.held import NOBODY

FORMAT_VERSION = 1
"""Part of every fingerprint. Raise it when a component changes its meaning: all prompt caches
become stale."""

TOOLS_DIGEST = "tools.digest"
"""The component that the tools of a prompt are."""

OWNER = "owner"
"""The component that keeps a learned prompt for its user."""

_MAGIC = b"rkcached fingerprint\0"

Value = str | int | float | bool | None


class Components(Mapping[str, str]):
    """Named texts that do not change, by name.

    Thousands of prompts have nearly the same: each is kept once.
    """

    __slots__ = ("_places", "_texts")

    def __init__(self, texts: Mapping[str, str]) -> None:
        names = sorted(texts)
        self._places = _places(tuple(map(sys.intern, names)))
        self._texts = tuple(sys.intern(texts[name]) for name in names)

    def __getitem__(self, name: str) -> str:
        return self._texts[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._texts)

    def __repr__(self) -> str:
        return repr(dict(self))


@functools.lru_cache(maxsize=64)
def _places(names: tuple[str, ...]) -> dict[str, int]:
    """The same object for the same names."""
    return {name: place for place, name in enumerate(names)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """`digest` is a SHA-256 in hexadecimal, made from `components`, which are canonical texts."""

    digest: str
    components: Mapping[str, str]

    def __str__(self) -> str:
        return self.digest[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A component that differs; `old` or `new` is None where it exists on one side only."""

    component: str
    old: str | None
    new: str | None

    @property
    def is_of_text(self) -> bool:
        """Whether it changes nothing but the text that is prefilled."""
        return self.component.startswith(("prefix.", TOOLS_DIGEST))

    def __str__(self) -> str:
        return f"{self.component}: {_short(self.old)} -> {_short(self.new)}"


def fingerprint(components: Mapping[str, Value]) -> Fingerprint:
    """Hash `components`, whose order does not matter.

    Encoding: magic, then u32 format version, then for each component in byte order of its name: u64
    length and UTF-8 bytes of the name, u64 length and UTF-8 bytes of the value. Integers are
    little-endian. The lengths keep ("ab", "c") apart from ("a", "bc").
    """
    texts = Components({name: _canonical(value) for name, value in components.items()})
    parts = [_part(text) for item in texts.items() for text in item]
    data = b"".join((_MAGIC, FORMAT_VERSION.to_bytes(4, "little"), *parts))
    return Fingerprint(digest=sys.intern(hashlib.sha256(data).hexdigest()), components=texts)


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[Change, ...]:
    """List the differences between two sets of components, by name."""
    return tuple(
        Change(component=name, old=old.get(name), new=new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    )


def reason_of(changed: Iterable[Change]) -> str:
    """Why a prompt cache is stale. Size and digest of its text would say nothing to a reader.

    Its tools are a part of its text: if they changed, nothing is known of the rest.
    """
    changed = tuple(changed)
    of_text = "its text changed"
    if any(change.component == TOOLS_DIGEST for change in changed):
        of_text = "its tools changed"

    reasons = []
    for change in changed:
        reason = str(change)
        if change.is_of_text:
            reason = of_text
        reasons.append(reason)

    return ", ".join(dict.fromkeys(reasons))


def owner_in(components: Mapping[str, str]) -> int:
    """The uid of the only user whom a prompt cache with these components serves, or NOBODY."""
    return int(components.get(OWNER, NOBODY))


OF_TEXT = frozenset({"prefix.digest", "prefix.bytes", TOOLS_DIGEST})
"""The components that a prompt's own text makes."""


def differ_in_text_only(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether all components but those of the text, and whose it is, are the same."""
    names = (one.keys() | other.keys()) - OF_TEXT - {OWNER}
    return all(one.get(name) == other.get(name) for name in names)


@functools.lru_cache(maxsize=1024)  # most components are the same for all prompts of a model
def _part(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


@functools.lru_cache(maxsize=1024, typed=True)
def _canonical(value: Value) -> str:
    """One text for one value: 1 and 1.0 are the same parameter, and a float reads back exactly."""
    match value:
        case None:
            return "unset"
        case bool():
            return "true" if value else "false"
        case float() if value.is_integer():
            return str(int(value))
        case float():
            return repr(value)
        case _:
            return str(value)


def _short(text: str | None) -> str:
    """A digest is told by its first digits; everything else is shown whole."""
    if text is None:
        return "absent"
    is_digest = len(text) == hashlib.sha256().digest_size * 2 and all(
        c in "0123456789abcdef" for c in text
    )
    return text[:12] if is_digest else text
