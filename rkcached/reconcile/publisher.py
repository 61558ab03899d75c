"""Publishes what looks and glances saw, and announces what is new in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rkcached.host.logs import log
from rkcached.plan.desired import Desired
from rkcached.plan.fingerprint import changes
from rkcached.plan.records import State
from rkcached.reconcile.announcer import Announcer
from rkcached.reconcile.index import ArtifactIndex
from rkcached.reconcile.observer import Glimpse, Observation
from rkcached.reconcile.snapshot import Published
from rkcached.sources.records import Key
from rkcached.store.sidecar import StoredArtifact
from rkcached.worker.held import NOBODY


class Publisher:
    """Makes the next snapshot of an observation."""

    def __init__(self, published: Published, announcer: Announcer) -> None:
        self._published = published
        self._announcer = announcer

    def look(self, observation: Observation) -> None:
        """Publish everything that a look saw."""
        self._note_news(observation)
        inventory = observation.inventory
        shown = {
            assessment.key: assessment
            for assessment in observation.assessments
            if not assessment.retired
        }
        fresh = {
            key: inventory.artifacts[key]
            for key, assessment in shown.items()
            if assessment.state is State.FRESH and key in inventory.artifacts
        }
        old = {
            key: artifact
            for key, artifact in inventory.artifacts.items()
            if key not in fresh and _differs_by_text(artifact, observation.desired)
        }
        unreadable = {key: bad.size_bytes for key, bad in inventory.unreadable.items()}

        self._published.change(
            manifest=observation.manifest,
            desired=observation.desired,
            private=_private(observation),
            skipped_files=observation.sources.skipped_files,
            assessments=shown,
            artifacts=dict(inventory.artifacts),
            index=ArtifactIndex(fresh, old),
            unreadable_bytes=unreadable,
            retired=dict(inventory.retired),
            foreign_bytes=sum(inventory.foreign.values()),
            quarantine_bytes=sum(inventory.quarantined.values()),
            store_trouble=observation.store_trouble,
        )
        for assessment in shown.values():
            self._announcer.state(assessment)
        self._announcer.forget_all_but(set(shown))

    def glimpses(self, glimpses: Iterable[Glimpse]) -> None:
        """Publish that a glance found prompts changed: their caches are not used any more."""
        snapshot = self._published.now
        prompts = dict(snapshot.desired.prompts)
        texts = dict(snapshot.desired.texts)
        assessments = dict(snapshot.assessments)
        index = snapshot.index

        for glimpse in glimpses:
            key = glimpse.prompt.key
            prompts[key] = glimpse.prompt
            texts[key] = glimpse.text
            assessments[key] = glimpse.assessment
            index = index.outdated(key)
            self._announcer.state(glimpse.assessment)

        self._published.change(
            desired=replace(snapshot.desired, prompts=prompts, texts=texts),
            assessments=assessments,
            index=index,
        )

    def _note_news(self, observation: Observation) -> None:
        """Log what is wrong with the store and the sources, once for each change."""
        before = self._published.now
        error = observation.store_trouble
        known = before.store_trouble.message if before.store_trouble is not None else ""
        if error is not None and error.message != known:
            log.error("store not readable", error=error.message, hint=error.hint)

        if skipped := set(observation.sources.skipped_files) - set(before.skipped_files):
            log.info(
                "prompt files skipped",
                files=sorted(skipped),
                reason="their names cannot be a prompt's",
                hint="rename them to make prompts of them",
            )

        unlisted = map(str, observation.sources.unlisted_models.values())
        self._announcer.notices((*observation.desired.notices, *unlisted))


def _private(observation: Observation) -> dict[Key, int]:
    """The keys that serve one user only. One that is to be built is declared before."""
    artifacts = observation.inventory.artifacts
    owners = {key: artifact.owner for key, artifact in artifacts.items()}
    owners |= observation.desired.learned
    return {key: owner for key, owner in owners.items() if owner != NOBODY}


def _differs_by_text(artifact: StoredArtifact, desired: Desired) -> bool:
    """Whether it is what its prompt is to have, but for the text.

    The beginning that both texts share is right in it, then.
    """
    wanted = desired.fingerprint(Key(artifact.sidecar.model, artifact.sidecar.prompt))
    if wanted is None or artifact.corrupt:
        return False
    return all(change.is_of_text for change in changes(artifact.components, wanted.components))
