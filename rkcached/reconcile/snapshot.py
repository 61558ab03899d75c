"""The reconciler's state, as serving, the API and the commands' status may see it.

A snapshot is frozen and complete. A change of anything makes a new one, which `Published` hands
out; who holds an older one keeps a consistent picture. With 10,000 prompts a change copies at most
a few dicts of references (0.1 ms each), and the progress of a build copies none.

All of this is on the event loop. Only the reconciler and its parts change it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from rkcached.errors import ManifestError, StoreError
from rkcached.host.digests import Digests, Reading
from rkcached.plan.desired import Desired, DesiredModel
from rkcached.plan.records import Assessment, Retired, State
from rkcached.reconcile.index import ArtifactIndex
from rkcached.sources.learned_texts import LEARNED
from rkcached.sources.manifest import Manifest
from rkcached.sources.records import Key, Trouble
from rkcached.store.sidecar import StoredArtifact
from rkcached.worker.held import NOBODY

Name = TypeVar("Name", Key, str)
Thing = TypeVar("Thing")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildProgress:
    """The build that is running now."""

    key: Key
    reason: str
    fingerprint: str
    started: float
    """Monotonic seconds."""
    done_tokens: int = 0
    total_tokens: int = 0
    read_from: int = 0
    """The tokens that it had when it began to read: of another prompt cache, or from before."""
    read_since: float = 0.0
    """When it began to read."""
    read_at: float = 0.0
    """When it had read `done_tokens`."""
    proof_s: float | None = None
    """The proof after the prefill took so long, the last time; None: not known."""
    aside_s: float | None = None
    """Making room for a request took so long, the last time; None: not known."""
    keeps_state: bool = False
    """A request that interrupts it goes on from what it has read."""

    def read(self, done: int, total: int, now: float) -> BuildProgress:
        """It has read so many tokens by this time."""
        first = not self.read_at
        return replace(
            self,
            done_tokens=done,
            total_tokens=total,
            read_from=done if first else self.read_from,
            read_since=now if first else self.read_since,
            read_at=now,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that others may know of the reconciler at one moment. Never changed."""

    # The manifest in force, and what follows from it
    manifest: Manifest
    manifest_error: ManifestError | None = None
    """Why the file on disk is not in force. The last good one is."""
    desired: Desired = field(default_factory=lambda: Desired(models={}, prompts={}, texts={}))
    skipped_files: tuple[str, ...] = ()
    """In a prompts_from folder, but with names that no prompt can have."""

    private: Mapping[Key, int] = field(default_factory=dict)
    """The prompts, and artifacts without a prompt, that serve one user only, by uid."""

    # The store
    assessments: Mapping[Key, Assessment] = field(default_factory=dict)
    artifacts: Mapping[Key, StoredArtifact] = field(default_factory=dict)
    index: ArtifactIndex = field(default_factory=ArtifactIndex)
    unreadable_bytes: Mapping[Key, int] = field(default_factory=dict)
    """Of artifacts without a usable sidecar."""
    retired: Mapping[str, Retired] = field(default_factory=dict)
    """By fingerprint."""
    foreign_bytes: int = 0
    quarantine_bytes: int = 0
    store_trouble: StoreError | None = None
    """Why the store cannot be read."""

    # The reconciler itself
    ready: bool = False
    """The first look is over, and a plan exists."""
    reading: Reading | None = None
    """Until then: the file that is being read."""
    building: BuildProgress | None = None
    held: str = ""
    """The words after "waits" for builds that may not begin now; empty if none is held back."""
    looks: int = 0
    """Finished since the start."""
    last_look_ms: float = 0.0
    builds: int = 0
    """Artifacts published since the start."""

    def model(self, name: str) -> DesiredModel | Trouble | None:
        return self.desired.models.get(name)

    def is_building(self, key: Key) -> bool:
        return self.building is not None and self.building.key == key

    # Whose it is

    def may_see(self, viewer: int | None, key: Key) -> bool:
        """Whether this user (None: everybody's administrator) may know of a prompt.

        One that is not known any more may have been a user's own.
        """
        if viewer is None:
            return True
        if key in self.private:
            return self.private[key] == viewer
        is_known = key in self.desired.prompts or key in self.artifacts
        return is_known or not key.prompt.startswith(LEARNED)

    def seen_by(self, viewer: int | None) -> Snapshot:
        """The snapshot without prompts and prompt caches that serve other users only."""
        if viewer is None:
            return self

        hidden = {key for key, owner in self.private.items() if owner != viewer}
        retired = {
            digest: artifact
            for digest, artifact in self.retired.items()
            if artifact.owner in (NOBODY, viewer)
        }
        if not hidden and len(retired) == len(self.retired):
            return self

        building = self.building
        if building is not None and building.key in hidden:
            building = None
        desired = replace(
            self.desired,
            prompts=_but(self.desired.prompts, hidden),
            texts=_but(self.desired.texts, hidden),
            stored=self.desired.stored - hidden,
            learned=_but(self.desired.learned, hidden),
        )
        return replace(
            self,
            desired=desired,
            assessments=_but(self.assessments, hidden),
            artifacts=_but(self.artifacts, hidden),
            unreadable_bytes=_but(self.unreadable_bytes, hidden),
            retired=retired,
            building=building,
        )

    # Sizes

    def used_bytes(self) -> int:
        """Everything that counts against cache.max_bytes."""
        return self.claimed_bytes() + self.retired_bytes()

    def claimed_bytes(self, but: Key | None = None) -> int:
        """The part of `used_bytes` that a build cannot make room of, without the artifact of `but`.

        Retired artifacts and the quarantine are not in it: they are removed where a build needs
        their room.
        """
        sizes = self._sizes()
        if but is not None:
            sizes.pop(but, None)
        return self.foreign_bytes + sum(sizes.values())

    def retired_bytes(self) -> int:
        return sum(artifact.size_bytes for artifact in self.retired.values())

    def orphan_bytes(self) -> int:
        declared = self.desired.prompts
        return sum(size for key, size in self._sizes().items() if key not in declared)

    def _sizes(self) -> dict[Key, int]:
        """Bytes of each artifact, also of those without a usable sidecar."""
        sizes = dict(self.unreadable_bytes)
        for key, artifact in self.artifacts.items():
            sizes[key] = artifact.sidecar.size_bytes
        return sizes

    # Changes

    def with_assessment(self, assessment: Assessment) -> Snapshot:
        """The state of one prompt is this now."""
        return replace(self, assessments={**self.assessments, assessment.key: assessment})

    def with_artifact(self, key: Key, artifact: StoredArtifact) -> Snapshot:
        """This artifact has just been published. Its prompt is fresh if it is what is wanted."""
        changed = replace(
            self,
            artifacts={**self.artifacts, key: artifact},
            unreadable_bytes=_without(self.unreadable_bytes, key),
            index=self.index.without(key),
        )
        prompt = self.desired.prompts.get(key)
        if prompt is None or prompt.fingerprint is None:
            return changed
        if prompt.fingerprint.digest != artifact.sidecar.fingerprint:
            return changed

        fresh = Assessment(key=key, state=State.FRESH, description=prompt.description)
        return replace(
            changed,
            index=self.index.with_artifact(key, artifact),
            assessments={**self.assessments, key: fresh},
        )

    def without_artifact(self, key: Key) -> Snapshot:
        """There is no artifact in this place any more."""
        assessments = self.assessments
        if key not in self.desired.prompts:
            # Who asked for the removal must not see it any more.
            assessments = _without(assessments, key)

        return replace(
            self.unserved(key),
            assessments=assessments,
            unreadable_bytes=_without(self.unreadable_bytes, key),
        )

    def unserved(self, key: Key) -> Snapshot:
        """The artifact of this prompt is not to be used: a request could not load it."""
        return replace(
            self,
            artifacts=_without(self.artifacts, key),
            index=self.index.without(key),
        )

    def without_retired(self, fingerprint: str) -> Snapshot:
        return replace(self, retired=_without(self.retired, fingerprint))


class Published:
    """The snapshot of this moment.

    Made before every part that reads it, so that none of them needs the reconciler for that.
    """

    def __init__(self, manifest: Manifest, digests: Digests) -> None:
        self._digests = digests
        self._now = Snapshot(manifest=manifest)

    @property
    def now(self) -> Snapshot:
        if self._now.ready:
            return self._now
        reading = self._digests.reading  # a thread moves it on
        return replace(self._now, reading=None if reading is None else replace(reading))

    def put(self, snapshot: Snapshot) -> None:
        """For the reconciler and its parts only."""
        self._now = snapshot

    def change(self, **changes: Any) -> None:
        """For the reconciler and its parts only: fields of the snapshot by name."""
        self._now = replace(self._now, **changes)


def _but(mapping: Mapping[Key, Thing], hidden: Container[Key]) -> Mapping[Key, Thing]:
    return {key: thing for key, thing in mapping.items() if key not in hidden}


def _without(mapping: Mapping[Name, Thing], name: Name) -> Mapping[Name, Thing]:
    """The same mapping if the name is not in it."""
    if name not in mapping:
        return mapping

    rest = dict(mapping)
    del rest[name]
    return rest
