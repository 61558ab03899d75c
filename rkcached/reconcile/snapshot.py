"""What the rest of the daemon may see of the reconciler's state, and how a request finds its prompt cache.

The index keeps digests, not texts: for each length in use, the SHA-256 of the prefixes of that length. One pass over a
request hashes it once and looks at every length on the way. All of this belongs to the event loop; only the reconciler
changes it.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
from dataclasses import dataclass, field

from rkcached.plan.desired import Desired, DesiredModel
from rkcached.plan.planner import Assessment, Retired
from rkcached.sources.manifest import Manifest
from rkcached.sources.records import Key, Trouble
from rkcached.store.sidecar import StoredArtifact


class FreshIndex:
    """The artifacts that may be served, by model. Owned by the event loop."""

    def __init__(self) -> None:
        self._artifacts: dict[Key, StoredArtifact] = {}
        self._prefixes: dict[str, dict[int, dict[str, Key]]] = {}
        self._lengths: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._artifacts)

    def get(self, key: Key) -> StoredArtifact | None:
        return self._artifacts.get(key)

    def all(self) -> dict[Key, StoredArtifact]:
        """As they are now: a copy."""
        return dict(self._artifacts)

    def add(self, key: Key, artifact: StoredArtifact) -> None:
        self.discard(key)
        self._artifacts[key] = artifact
        length, digest = _prefix(artifact)
        by_length = self._prefixes.setdefault(key.model, {})
        if length not in by_length:
            by_length[length] = {}
            bisect.insort(self._lengths.setdefault(key.model, []), length)
        by_length[length][digest] = key

    def discard(self, key: Key) -> None:
        artifact = self._artifacts.pop(key, None)
        if artifact is None:
            return
        length, digest = _prefix(artifact)
        same_length = self._prefixes[key.model][length]
        if same_length.get(digest) == key:  # two prompts may have one text
            del same_length[digest]
            twin = next(
                (
                    k
                    for k, a in self._artifacts.items()
                    if k.model == key.model and _prefix(a)[1] == digest
                ),
                None,
            )
            if twin is not None:
                same_length[digest] = twin
        if not same_length:
            del self._prefixes[key.model][length]
            self._lengths[key.model].remove(length)

    def longest(self, model: str, rendered: bytes) -> Key | None:
        """The key of the longest prefix that `rendered` (UTF-8) starts with, if any."""
        best = None
        sha = hashlib.sha256()
        hashed = 0
        for length in self._lengths.get(model, ()):
            if length > len(rendered):
                break
            sha.update(rendered[hashed:length])
            hashed = length
            best = self._prefixes[model][length].get(sha.copy().hexdigest(), best)
        return best


@dataclass(slots=True, kw_only=True)
class BuildProgress:
    """The build that is running now."""

    key: Key
    reason: str
    fingerprint: str
    started: float
    """Monotonic seconds."""
    done_tokens: int = 0
    total_tokens: int = 0
    task: asyncio.Task[None] | None = None


@dataclass(slots=True, kw_only=True)
class View:
    """What the rest of the daemon may see. Replaced or patched by the reconciler only."""

    manifest: Manifest
    desired: Desired
    assessments: dict[Key, Assessment] = field(default_factory=dict)
    artifacts: dict[Key, StoredArtifact] = field(default_factory=dict)
    index: FreshIndex = field(default_factory=FreshIndex)
    unreadable_bytes: dict[Key, int] = field(default_factory=dict)
    """Of artifacts without a usable sidecar."""
    retired: dict[str, Retired] = field(default_factory=dict)
    """By fingerprint."""
    foreign_bytes: int = 0
    quarantine_bytes: int = 0
    skipped_files: tuple[str, ...] = ()
    """In a prompts_from folder, but with names that no prompt can have."""

    def model(self, name: str) -> DesiredModel | Trouble | None:
        return self.desired.models.get(name)

    def used_bytes(self) -> int:
        """Everything that counts against cache.max_bytes."""
        return self.claimed_bytes() + self.retired_bytes()

    def claimed_bytes(self, but: Key | None = None) -> int:
        """The part of `used_bytes` that a build cannot make room of, without the artifact of `but`.

        Retired artifacts and the quarantine are not in it: they are removed where a build needs
        their room.
        """
        sizes = self.unreadable_bytes | {
            key: a.sidecar.size_bytes for key, a in self.artifacts.items()
        }
        return self.foreign_bytes + sum(
            size_bytes for key, size_bytes in sizes.items() if key != but
        )

    def retired_bytes(self) -> int:
        return sum(one.size_bytes for one in self.retired.values())

    def orphan_bytes(self) -> int:
        sizes = self.unreadable_bytes | {
            key: a.sidecar.size_bytes for key, a in self.artifacts.items()
        }
        return sum(
            size_bytes for key, size_bytes in sizes.items() if key not in self.desired.prompts
        )


def _prefix(artifact: StoredArtifact) -> tuple[int, str]:
    components = artifact.sidecar.components
    return int(components["prefix.bytes"]), components["prefix.digest"]
