"""Carries out what a plan says but for the builds: adopt, retire, remove.

What a build replaces meanwhile, or has replaced since the look saw the store, is left alone: the
next look plans it anew. On the event loop; the store works in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from rkcached import errors
from rkcached.host.logs import log
from rkcached.plan.records import (
    PASSING_RETRY_S,
    Action,
    Adopt,
    Assessment,
    Blocked,
    Remove,
    Retire,
    State,
)
from rkcached.reconcile.announcer import Announcer
from rkcached.reconcile.failures import Failures
from rkcached.reconcile.observer import Observation
from rkcached.reconcile.snapshot import Published
from rkcached.reconcile.wake import Wake
from rkcached.sources.records import Key
from rkcached.store.sidecar import StoredArtifact
from rkcached.store.store import Store

ACT_S = 5.0
"""A look stops adopting and retiring after so long, and the next one goes on: an edit does not wait
for them."""


class Actor:
    """Acts on what a look observed."""

    def __init__(
        self,
        *,
        store: Store,
        published: Published,
        announcer: Announcer,
        failures: Failures,
        wake: Wake,
    ) -> None:
        self._store = store
        self._published = published
        self._announcer = announcer
        self._failures = failures
        self._wake = wake
        # Prompts whose last adoption failed.
        self._unadopted: set[Key] = set()

    async def act(self, observation: Observation) -> set[Key]:
        """Carry out the plan but for the builds; returns the keys of what was done.

        What takes too long is left to the next look, which comes at once.
        """
        started = time.monotonic()
        done: set[Key] = set()

        for action in observation.actions:
            self._store.digests.steps += 1
            in_time = time.monotonic() - started < ACT_S

            match action:
                case Remove(retired=fingerprint) if fingerprint:
                    changed = await self._remove_retired(action)
                case Remove():
                    changed = await self._take_out(action, observation, self._store.remove)
                case Retire() if in_time:
                    changed = await self._take_out(action, observation, self._store.retire)
                case Adopt() if in_time:
                    changed = await self._adopt(action, observation)
                case Retire() | Adopt():
                    self._wake.look_again(now=True)
                    continue
                case _:
                    continue
            if changed:
                done.add(action.key)

        return done

    def _may_change(self, key: Key, observation: Observation) -> bool:
        """Whether an artifact is as the look saw it: not if a build replaces it, or has."""
        snapshot = self._published.now
        same = snapshot.artifacts.get(key) is observation.inventory.artifacts.get(key)
        return same and not snapshot.is_building(key)

    async def _adopt(self, action: Adopt, observation: Observation) -> bool:
        """Publish an artifact that the store has under another name. Returns whether it was."""
        key = action.key
        source = action.source
        if not self._may_change(key, observation):
            return False
        if source is not None and not self._may_change(source, observation):
            return False

        try:
            artifact = await asyncio.to_thread(
                self._store.adopt,
                key,
                action.fingerprint.digest,
                source=source,
                take=action.take,
                retire=observation.manifest.cache.keep_retired_s > 0,
            )
        except errors.StoreError as error:
            return self._not_adopted(action, error)
        self._unadopted.discard(key)

        if action.take and source is None:
            snapshot = self._published.now.without_retired(action.fingerprint.digest)
            self._published.put(snapshot)
        elif action.take and source is not None:
            self._published.put(self._published.now.without_artifact(source))

        log.info(
            "artifact adopted",
            **key._asdict(),
            state=State.FRESH.value,
            reason=action.reason,
            tokens=artifact.sidecar.tokens,
            size_bytes=artifact.sidecar.size_bytes,
        )
        self._failures.built(key)
        publish_artifact(self._published, self._announcer, key, artifact)
        return True

    def _not_adopted(self, action: Adopt, error: errors.StoreError) -> bool:
        """Block the prompt. Returns whether to look again at once: the first time.

        The source may be out of use by now, which another look finds out.
        """
        key = action.key
        first_time = key not in self._unadopted
        self._unadopted.add(key)
        if first_time:
            _log_trouble("artifact not adopted", action, error)

        blocked = Blocked(
            key=key,
            reason=error.message,
            hint=error.hint,
            retry_at=time.time() + PASSING_RETRY_S,
        )
        assessment = Assessment(
            key=key, state=State.BLOCKED, reason=error.message, hint=error.hint, action=blocked
        )
        self._published.put(self._published.now.with_assessment(assessment))
        return first_time

    async def _take_out(
        self, action: Retire | Remove, observation: Observation, take: Callable[[Key], None]
    ) -> bool:
        """Retire or remove the artifact of a prompt, by `take`. Returns whether it was done."""
        key = action.key
        done = "artifact removed"
        not_done = "artifact not removed"
        if isinstance(action, Retire):
            done = "artifact retired"
            not_done = "artifact not retired"
        if not self._may_change(key, observation):
            return False

        try:
            if action.verdict is not None:
                await asyncio.to_thread(self._store.verdicts.write, key, action.verdict)
            await asyncio.to_thread(take, key)
        except errors.StoreError as error:
            _log_trouble(not_done, action, error)
            return False

        self._published.put(self._published.now.without_artifact(key))
        log.info(done, **key._asdict(), reason=action.reason)
        return True

    async def _remove_retired(self, action: Remove) -> bool:
        try:
            await asyncio.to_thread(self._store.retired.remove, action.retired)
        except errors.StoreError as error:
            _log_trouble("retired artifact not removed", action, error)
            return False

        self._published.put(self._published.now.without_retired(action.retired))
        key = action.key
        log.info("retired artifact removed", **key._asdict(), reason=action.reason)
        return True


def publish_artifact(
    published: Published, announcer: Announcer, key: Key, artifact: StoredArtifact
) -> None:
    """The store has this artifact now: serve it, if it is what is wanted."""
    snapshot = published.now.with_artifact(key, artifact)
    published.put(snapshot)
    if snapshot.index.get(key) is artifact:
        announcer.state(snapshot.assessments[key])


def _log_trouble(event: str, action: Action, error: errors.StoreError) -> None:
    key = action.key
    log.error(event, **key._asdict(), error=error.message, hint=error.hint)
