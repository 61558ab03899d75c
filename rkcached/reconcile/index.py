"""The index of prompt caches: it finds those that begin as a request does.

The texts of a model's prompt caches are sorted. The one that shares the longest beginning with a
request then stands beside the place where the request would stand, so a search compares some 15
texts of 10,000 with it.

A prompt cache that serves one user only stands on a shelf of that user's, apart from those of
everybody. A search goes through the shelf of all and the one of who asks.

An index never changes. `with_artifact`, `outdated` and `without` return another one and copy only
references: some 0.4 ms with 10,000 prompts. Thus a snapshot can hold it, and a request that took it
sees no half of a change.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rkcached.engines.prefix import common_bytes
from rkcached.sources.records import Key
from rkcached.store.sidecar import StoredArtifact
from rkcached.worker.held import NOBODY


class Match(NamedTuple):
    """A prompt cache whose text begins as a request does."""

    key: Key
    artifact: StoredArtifact
    common_bytes: int
    """The length of that beginning (UTF-8)."""

    @property
    def is_whole(self) -> bool:
        """Whether the request begins with all of the text."""
        return self.common_bytes == len(self.artifact.text)


Shelf = tuple[str, int]
"""A model, and the uid of whom its prompt caches serve, or NOBODY."""


class _Sorted(NamedTuple):
    """The prompt caches of a shelf, in the order of their texts, and of their names within that."""

    texts: tuple[bytes, ...]
    keys: tuple[Key, ...]


_NONE = _Sorted((), ())


class ArtifactIndex:
    """The artifacts that requests may use: those of the prompts as they are, and as they were."""

    __slots__ = ("_fresh", "_old", "_sorted")

    def __init__(
        self,
        fresh: Mapping[Key, StoredArtifact] | None = None,
        old: Mapping[Key, StoredArtifact] | None = None,
        by_text: Mapping[Shelf, _Sorted] | None = None,
    ) -> None:
        """`old`: of prompts whose text changed since, and nothing else. No key is in both.

        `by_text`, by shelf, is for this module: what the two come to.
        """
        self._fresh = fresh or {}
        self._old = old or {}
        self._sorted = _sort({**self._fresh, **self._old}) if by_text is None else by_text

    def __len__(self) -> int:
        """The number of fresh artifacts."""
        return len(self._fresh)

    def get(self, key: Key) -> StoredArtifact | None:
        """The fresh artifact of a prompt."""
        return self._fresh.get(key)

    def all(self) -> Mapping[Key, StoredArtifact]:
        """The fresh artifacts."""
        return self._fresh

    def longest(self, model: str, rendered: bytes, user: int = NOBODY) -> Match | None:
        """The fresh artifact with the longest text that `rendered` (UTF-8) starts with, if any.

        Of those that serve this user.
        """
        return _longer(
            self._longest((model, shelf), rendered) for shelf in dict.fromkeys((NOBODY, user))
        )

    def closest(self, model: str, rendered: bytes, user: int = NOBODY) -> Match | None:
        """The artifact that shares the longest beginning with `rendered` (UTF-8), if any.

        Of those that serve this user.
        """
        return _longer(
            self._closest((model, shelf), rendered) for shelf in dict.fromkeys((NOBODY, user))
        )

    def _longest(self, shelf: Shelf, rendered: bytes) -> Match | None:
        texts, keys = self._sorted.get(shelf, _NONE)
        rest = rendered
        at = bisect.bisect_right(texts, rest)
        while at > 0:
            text, key = texts[at - 1], keys[at - 1]
            common = common_bytes(text, rest)
            if common < len(text):
                # Texts that `rendered` starts with are no longer than that.
                rest = rest[:common]
                at = bisect.bisect_right(texts, rest, hi=at - 1)
                continue
            if key in self._fresh:
                return Match(key, self._fresh[key], common)
            at -= 1

        return None

    def _closest(self, shelf: Shelf, rendered: bytes) -> Match | None:
        texts, keys = self._sorted.get(shelf, _NONE)
        at = bisect.bisect_right(texts, rendered)
        best: Match | None = None
        for beside in (at - 1, at):
            if not 0 <= beside < len(texts):
                continue
            common = common_bytes(texts[beside], rendered)
            artifact = self._any(keys[beside])
            if artifact is not None and common > (0 if best is None else best.common_bytes):
                best = Match(keys[beside], artifact, common)

        return best

    def with_artifact(self, key: Key, artifact: StoredArtifact) -> ArtifactIndex:
        """This index, with `artifact` as the fresh one of `key`."""
        return self._changed(key, artifact)

    def outdated(self, key: Key) -> ArtifactIndex:
        """This index, after a change of the prompt's text: its artifact is not fresh any more."""
        artifact = self._fresh.get(key)
        if artifact is None:
            return self

        fresh = dict(self._fresh)
        del fresh[key]
        return ArtifactIndex(fresh, {**self._old, key: artifact}, self._sorted)

    def without(self, key: Key) -> ArtifactIndex:
        """This index, without the artifact of `key`; the same object if it has none."""
        return self if self._any(key) is None else self._changed(key, None)

    def _changed(self, key: Key, artifact: StoredArtifact | None) -> ArtifactIndex:
        fresh = dict(self._fresh)
        old = dict(self._old)
        by_text = dict(self._sorted)

        before = fresh.pop(key, None) or old.pop(key, None)
        if before is not None:
            shelf = (key.model, before.owner)
            texts, keys = by_text[shelf]
            at = _place(texts, keys, before.text, key)
            by_text[shelf] = _Sorted(texts[:at] + texts[at + 1 :], keys[:at] + keys[at + 1 :])

        if artifact is not None:
            fresh[key] = artifact
            shelf = (key.model, artifact.owner)
            texts, keys = by_text.get(shelf, _NONE)
            at = _place(texts, keys, artifact.text, key)
            by_text[shelf] = _Sorted(
                (*texts[:at], artifact.text, *texts[at:]), (*keys[:at], key, *keys[at:])
            )

        return ArtifactIndex(fresh, old, by_text)

    def _any(self, key: Key) -> StoredArtifact | None:
        artifact = self._fresh.get(key)
        return self._old.get(key) if artifact is None else artifact


def _longer(matches: Iterable[Match | None]) -> Match | None:
    """The match with the longest beginning, the first of several."""
    found = [match for match in matches if match is not None]
    return max(found, key=lambda match: match.common_bytes, default=None)


def _sort(artifacts: Mapping[Key, StoredArtifact]) -> dict[Shelf, _Sorted]:
    by_shelf: dict[Shelf, list[tuple[bytes, Key]]] = {}
    for key, artifact in artifacts.items():
        by_shelf.setdefault((key.model, artifact.owner), []).append((artifact.text, key))

    result = {}
    for shelf, entries in by_shelf.items():
        entries.sort()
        texts, keys = zip(*entries, strict=True)
        result[shelf] = _Sorted(texts, keys)

    return result


def _place(texts: tuple[bytes, ...], keys: tuple[Key, ...], text: bytes, key: Key) -> int:
    """Where a prompt cache with this text stands, or would stand."""
    begin = bisect.bisect_left(texts, text)
    end = bisect.bisect_right(texts, text)
    return bisect.bisect_left(keys, key, begin, end)
