"""The index of fresh artifacts: how a request finds its prompt cache.

It keeps digests, not texts: for each length in use, the SHA-256 of the prefixes of that length. One
pass over a request hashes it once and looks up every length on the way.

An index never changes. `with_artifact` and `without` return another one and copy only dicts of
references: some 0.3 ms with 10,000 prompts. Thus a snapshot can hold it, and a request that took it
sees no half of a change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from rkcached.sources.records import Key
from rkcached.store.sidecar import StoredArtifact

# The keys of a model's prefixes, by length in bytes and by digest.
_ByLength = Mapping[int, Mapping[str, Key]]


class FreshIndex:
    """The artifacts that may be served, by model and prefix."""

    __slots__ = ("_artifacts", "_lengths", "_prefixes")

    def __init__(
        self,
        artifacts: Mapping[Key, StoredArtifact] | None = None,
        prefixes: Mapping[str, _ByLength] | None = None,
    ) -> None:
        """Of these artifacts. `prefixes`, by model, are for this module: what they come to."""
        self._artifacts = artifacts or {}
        # Of two prompts with one text, the last has its place here.
        self._prefixes = _by_prefix(self._artifacts) if prefixes is None else prefixes
        # By model: the lengths in use, ascending.
        self._lengths = {model: sorted(lengths) for model, lengths in self._prefixes.items()}

    def __len__(self) -> int:
        return len(self._artifacts)

    def get(self, key: Key) -> StoredArtifact | None:
        return self._artifacts.get(key)

    def all(self) -> Mapping[Key, StoredArtifact]:
        return self._artifacts

    def longest(self, model: str, rendered: bytes) -> Key | None:
        """Find the key of the longest prefix that `rendered` (UTF-8) starts with, if any."""
        best = None
        hashed = 0
        sha = hashlib.sha256()

        for length in self._lengths.get(model, ()):
            if length > len(rendered):
                break
            sha.update(rendered[hashed:length])
            hashed = length
            best = self._prefixes[model][length].get(sha.copy().hexdigest(), best)

        return best

    def with_artifact(self, key: Key, artifact: StoredArtifact) -> FreshIndex:
        """This index, with `artifact` as the one of `key`."""
        if key in self._artifacts:
            return self.without(key).with_artifact(key, artifact)

        length, digest = _prefix(artifact)
        by_length = self._prefixes.get(key.model, {})
        same_length = {**by_length.get(length, {}), digest: key}
        return FreshIndex(
            {**self._artifacts, key: artifact},
            {**self._prefixes, key.model: {**by_length, length: same_length}},
        )

    def without(self, key: Key) -> FreshIndex:
        """This index, without the artifact of `key`; the same object if it has none."""
        if key not in self._artifacts:
            return self

        artifacts = dict(self._artifacts)
        length, digest = _prefix(artifacts.pop(key))
        by_length = dict(self._prefixes[key.model])
        same_length = dict(by_length.pop(length))

        if same_length[digest] == key:
            del same_length[digest]
            if (twin := _find(artifacts, key.model, digest)) is not None:
                same_length[digest] = twin
        if same_length:
            by_length[length] = same_length

        return FreshIndex(artifacts, {**self._prefixes, key.model: by_length})


def _by_prefix(artifacts: Mapping[Key, StoredArtifact]) -> dict[str, dict[int, dict[str, Key]]]:
    prefixes: dict[str, dict[int, dict[str, Key]]] = {}
    for key, artifact in artifacts.items():
        length, digest = _prefix(artifact)
        by_length = prefixes.setdefault(key.model, {})
        by_length.setdefault(length, {})[digest] = key
    return prefixes


def _find(artifacts: Mapping[Key, StoredArtifact], model: str, digest: str) -> Key | None:
    """Find a prompt of the model whose prefix has this digest."""
    for key, artifact in artifacts.items():
        if key.model == model and _prefix(artifact)[1] == digest:
            return key
    return None


def _prefix(artifact: StoredArtifact) -> tuple[int, str]:
    """Length in bytes and SHA-256 of the text that the artifact was made from."""
    components = artifact.sidecar.components
    return int(components["prefix.bytes"]), components["prefix.digest"]
