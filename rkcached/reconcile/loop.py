"""The reconciler: look, plan, act, until there is nothing to do.

The single writer of the store and of the snapshot that others read.

It is level-triggered. Events, signals, timers and finished builds all mean the same, "look again";
what to do comes only from comparing the manifest with the disk. Everything here runs on the event
loop except the looking itself, which reads files in a thread, one look at a time. One build runs at
a time; a build that nobody wants any more is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import structlog

from rkcached import errors
from rkcached.host.systemd import Service
from rkcached.host.watch import Follower, places
from rkcached.plan.desired import DesiredModel
from rkcached.plan.planner import (
    PASSING_RETRY_S,
    Action,
    Adopt,
    Assessment,
    Blocked,
    Build,
    Remove,
    Retire,
    State,
)
from rkcached.reconcile.announcer import Announcer
from rkcached.reconcile.attempts import Attempts, blames_model
from rkcached.reconcile.builder import REQUESTED, Builder, BuildRequest, size_if_same
from rkcached.reconcile.collection import Collection
from rkcached.reconcile.events import Events
from rkcached.reconcile.index import FreshIndex
from rkcached.reconcile.observer import Look, Observer
from rkcached.reconcile.patience import Patience
from rkcached.reconcile.snapshot import BuildProgress, Published, Snapshot
from rkcached.reconcile.verdicts import QUARANTINE_AFTER, quarantined
from rkcached.reconcile.waiters import BuildRequests
from rkcached.sources.manifest import Manifest
from rkcached.sources.manifest_file import ManifestFile, inputs
from rkcached.sources.records import Declaration, Key, Trouble
from rkcached.sources.stored_texts import StoredTexts
from rkcached.store.garbage import Rubbish
from rkcached.store.sidecar import StoredArtifact
from rkcached.store.store import Store
from rkcached.worker.gate import Gates, Priority
from rkcached.worker.pool import Workers

log = structlog.get_logger()

SETTLE_S = 0.2
"""Quiet time after the last event before looking: an editor's save is several events."""

MAX_SETTLE_S = 5.0
"""Look at the latest this long after the first event, even if they never stop."""

RESCAN_S = 60.0
"""Look at the latest this long after the last look: events can be lost."""

STORE_RETRY_S = 5.0
"""Look again after a look at a store that cannot be read."""

ACT_S = 5.0
"""A look stops adopting and putting aside after so long, and the next one goes on: an edit does not
wait for them."""

MAX_GLANCED_FILES = 64
"""More files than these are not worth a glance before the look."""


class Reconciler:
    """Makes the store equal to the manifest, and keeps it so."""

    def __init__(
        self,
        *,
        manifest_path: Path,
        manifest: Manifest,
        store: Store,
        stored: StoredTexts,
        workers: Workers,
        gates: Gates,
        watcher: Follower,
        events: Events,
        service: Service | None = None,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """`service` is told that the loop is alive.

        `on_turn` is called after each look, and now and then during the first.
        """
        self._service = service or Service()
        self._on_turn = on_turn
        self._announcer = Announcer(events)
        self._published = Published(manifest, store.digests)
        self._manifest_file = ManifestFile(manifest_path, manifest)
        self.ready = asyncio.Event()
        """Set once the first look is over and a plan exists."""
        self._store = store
        self._observer = Observer(store, stored)
        self._stored = stored
        self._curious: list[asyncio.Event] = []
        self._collections: list[Collection] = []
        self._workers = workers
        self._gates = gates
        self._watcher = watcher
        self._builder = Builder(store, workers, gates)
        self._wake = asyncio.Event()
        self._last_event = 0.0
        self._first_event = 0.0
        self._hurry = True
        self._pending: dict[Key, Build] = {}
        self._requests = BuildRequests()
        self._looking = False
        self._retiring: set[asyncio.Task[None]] = set()
        self._changed: set[str] = set()
        """Files known to have changed since the last look."""
        self._generation = 0
        """Counts changes of the store that were made outside of a look."""
        self._attempts = Attempts()
        self._unadopted: set[Key] = set()
        """Prompts whose last adoption failed."""
        self._patience = Patience()
        self._declared: Mapping[Key, Declaration] = {}
        """By the last look."""
        self._build_task: asyncio.Task[None] | None = None
        self._last_started: Key | None = None
        self._later: asyncio.TimerHandle | None = None
        """Starts a build that must wait until then."""

    @property
    def snapshot(self) -> Snapshot:
        """What everybody else may know of all this, at this moment."""
        return self._published.now

    # What others may ask for; all on the event loop

    def look_again(self, changed: Iterable[str] = (), *, now: bool = False) -> None:
        """Something may have changed: these files, or nobody knows what.

        `now` skips waiting for it to settle.
        """
        if len(self._changed) <= MAX_GLANCED_FILES:
            self._changed.update(changed)
        moment = asyncio.get_running_loop().time()
        if not self._wake.is_set():
            self._first_event = moment
        self._last_event = moment
        self._hurry = self._hurry or now
        self._wake.set()

    async def regenerate(self, key: Key) -> StoredArtifact:
        """Build this prompt anew, even if it is fresh.

        Errors: SourceError if it has no text; what the build raises.
        """
        desired = self.snapshot.desired.prompts.get(key)
        if desired is None:
            raise errors.SourceError(
                f"{key} is not declared", hint="`rkcached status` lists what is"
            )
        if desired.fingerprint is None:
            trouble = desired.trouble or Trouble(message="it has no text")
            raise errors.SourceError(f"{key} cannot be built: {trouble.message}", hint=trouble.hint)
        self._attempts.forgive_model(key.model)
        future = self._requests.ask(key, anew=True)
        self.look_again(now=True)
        return await asyncio.shield(future)

    async def freshen(self, key: Key) -> StoredArtifact:
        """The artifact of a prompt whose text was just written. Errors: as regenerate."""
        future = self._requests.ask(key, anew=False)
        self.look_again(now=True)
        return await asyncio.shield(future)

    async def next_look(self) -> None:
        """Return when a look that begins after this call has ended."""
        event = asyncio.Event()
        self._curious.append(event)
        self.look_again(now=True)
        await event.wait()

    async def forget(self, key: Key) -> None:
        """A text was deleted on purpose: its prompt caches go, too, and none is kept as retired.

        Errors: StoreError.
        """
        await self.next_look()
        await asyncio.to_thread(self._store.remove_retired_of, key)
        await self.next_look()

    async def collect(self, *, dry_run: bool, strangers: bool = False) -> list[Rubbish]:
        """Take out of the store what serves nobody; `dry_run`: only say what could go.

        Errors: StoreError.
        """
        future: asyncio.Future[list[Rubbish]] = asyncio.get_running_loop().create_future()
        collection = Collection(dry_run=dry_run, strangers=strangers, future=future)
        self._collections.append(collection)
        self.look_again(now=True)
        rubbish = await collection.future
        if not dry_run:
            await self.next_look()  # what did not fit may fit now
        return rubbish

    async def artifact_failed(
        self, key: Key, artifact: StoredArtifact, why: str, *, died: bool
    ) -> None:
        """A fresh artifact could not be loaded for a request, which is answered cold. Heal it.

        A clean refusal takes the artifact out at once; a worker's death does after QUARANTINE_AFTER
        times, for it may have another cause. A fingerprint that fails that often is left alone
        until one of its inputs changes.
        """
        if self.snapshot.artifacts.get(key) != artifact:
            return  # replaced meanwhile
        fingerprint = artifact.sidecar.fingerprint
        faults = self._attempts.load_fault(fingerprint)
        log.error(
            "artifact not loadable", model=key.model, prompt=key.prompt, why=why, times=faults
        )
        if died and faults < QUARANTINE_AFTER:
            return
        self._published.put(self.snapshot.unserved(key))
        self._generation += 1
        with contextlib.suppress(errors.StoreError):
            await asyncio.to_thread(self._store.quarantine, key)
            if faults >= QUARANTINE_AFTER:
                verdict = quarantined(fingerprint, f"loading it failed {faults} times: {why}")
                await asyncio.to_thread(self._store.write_verdict, key, verdict)
        log.error("artifact quarantined", model=key.model, prompt=key.prompt, why=why)
        self.look_again(now=True)

    def artifact_served(self, artifact: StoredArtifact) -> None:
        """A request was answered from it."""
        self._attempts.served(artifact.sidecar.fingerprint)

    # The loop

    async def run(self) -> None:
        """Reconcile until cancelled; then the running build is stopped and nothing of it is left."""
        try:
            while True:
                await self._settle()
                await self._watched(self._glance_and_look())
                self._start_next_build()
                self._on_turn()
                await self._wait()
        finally:
            if self._later is not None:
                self._later.cancel()
            await self._stop_build()
            for task in self._retiring:
                task.cancel()
            self._requests.cancel()
            for collection in self._collections:
                collection.future.cancel()

    async def _wait(self) -> None:
        """Until something wakes us, the next retry, or the next rescan."""
        retries = [
            a.action.retry_at
            for a in self.snapshot.assessments.values()
            if isinstance(a.action, Blocked)
        ]
        due = [at - time.time() for at in retries if at > 0]
        rescan_s = RESCAN_S if self.snapshot.store_trouble is None else STORE_RETRY_S
        loop = asyncio.get_running_loop()
        end = loop.time() + max(0.05, min([rescan_s, *due]))
        while True:
            building = self.snapshot.building
            if building is None or not self._workers.overdue(building.started):
                self._service.beat()
            left_s = end - loop.time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, self._service.pulse_s or left_s)):
                    await self._wake.wait()
                    return
            if loop.time() >= end:
                return

    async def _watched(self, look: Coroutine[None, None, None]) -> None:
        """Wait for a look, which may read large files for minutes; alive is one that gets on with it."""
        task, steps = asyncio.create_task(look), self._store.digests.steps
        try:
            while not (await asyncio.wait({task}, timeout=self._service.pulse_s))[0]:
                if steps != (steps := self._store.digests.steps):
                    self._service.beat()
                    if not self.ready.is_set():
                        self._on_turn()
        except asyncio.CancelledError:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            raise
        task.result()

    async def _settle(self) -> None:
        """Wait until events have been quiet for a while, so that half of a save is not looked at."""
        loop = asyncio.get_running_loop()
        while self._wake.is_set() and not self._hurry:
            quiet_at = min(self._last_event + SETTLE_S, self._first_event + MAX_SETTLE_S)
            if loop.time() >= quiet_at:
                break
            await asyncio.sleep(quiet_at - loop.time())
        self._hurry = False
        self._wake.clear()

    async def _glance_and_look(self) -> None:
        changed, self._changed = self._changed, set()
        if 0 < len(changed) <= MAX_GLANCED_FILES and self.snapshot.building is None:
            await self._glance(changed)
        await self._look()

    async def _glance(self, changed: set[str]) -> None:
        """Start the build of an edited prompt at once: with thousands of prompts, the look that follows takes a while.

        It is the look that decides: a build that it does not want is stopped.
        """
        before, generation = self.snapshot, self._generation
        manifest = await self._read_manifest()
        if manifest is not before.manifest or before.store_trouble is not None:
            return
        glimpses = await asyncio.to_thread(
            self._observer.glance, manifest, changed, before.index.all()
        )
        glimpses = [one for one in glimpses if not self._attempts.blames(one.prompt.key.model)]
        if not glimpses or generation != self._generation:
            return
        now = self.snapshot
        prompts, texts = dict(now.desired.prompts), dict(now.desired.texts)
        assessments, index = dict(now.assessments), now.index
        for one in glimpses:
            key = one.prompt.key
            prompts[key], texts[key] = one.prompt, one.text
            index = index.without(key)
            assessments[key] = one.assessment
            self._announcer.state(one.assessment)
        self._published.change(
            desired=replace(now.desired, prompts=prompts, texts=texts),
            assessments=assessments,
            index=index,
        )
        builds = {one.build.key: one.build for one in glimpses}
        self._pending = (
            builds | self._pending | builds
        )  # the first to be built, with the text of now
        self._start_next_build()

    async def _look(self) -> None:
        started = time.perf_counter()
        opened, curious, collections = self._requests.open(), self._curious, self._collections
        self._curious, self._collections = [], []
        self._looking = True  # a build may end while we look, but no other starts
        try:
            look, generation = await self._observe()
            running = self.snapshot.building
            building = running.key if running is not None else None
            self._note_store(look)
            self._publish(look)
            self._declared = look.sources.prompts
            self._patience.looked(look.desired.fingerprint, asyncio.get_running_loop().time())
            files, folders = inputs(look.manifest, self._manifest_file.path, self._stored)
            self._watcher.follow(await asyncio.to_thread(places, files, folders))
            self._retire_workers(look)
            for collection in collections:
                await collection.find(self._store, look, building, (files, folders))
            if await self._stop_unwanted_build(look):
                building = None
            acted = await self._act(look)
            for collection in collections:
                await collection.finish(self._store, acted)
            await self._tidy(look)
            anew = self._requests.looked(opened, self.snapshot.assessments, self.snapshot.artifacts)
            self._pending = self._builds_to_do(look, anew, building)
            await self._forget_verdicts(look)
        finally:
            self._looking = False
        for event in curious:
            event.set()
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self._store.digests.save)
        took_ms = (time.perf_counter() - started) * 1000
        self._published.change(looks=self.snapshot.looks + 1, last_look_ms=took_ms, ready=True)
        log.debug(
            "looked",
            took_ms=round(took_ms, 1),
            builds=len(self._pending),
            changed=len(acted),
        )
        self.ready.set()
        # What cannot be removed is tried again at the next look, not at once.
        if acted or generation != self._generation:
            self.look_again(now=True)
        if generation != self._generation:
            # a build or a request found something out since: the next look plans with that
            self._pending.clear()

    async def _tidy(self, look: Look) -> None:
        """The quarantine keeps what the budget leaves it."""
        limit = look.manifest.cache.max_bytes
        room = math.inf if limit is None else max(0, limit - self.snapshot.used_bytes())
        with contextlib.suppress(errors.StoreError):
            await asyncio.to_thread(self._store.tidy, look.inventory, room)
        self._published.change(quarantine_bytes=sum(look.inventory.quarantined.values()))

    def _note_store(self, look: Look) -> None:
        error, before = look.store_trouble, self.snapshot.store_trouble
        if error is not None and (before is None or before.message != error.message):
            log.error("store not readable", error=error.message, hint=error.hint)

    async def _observe(self) -> tuple[Look, int]:
        """A look during which the store did not change.

        As no build starts meanwhile, two looks are the most.
        """
        while True:
            generation = self._generation
            manifest = await self._read_manifest()
            look = await asyncio.to_thread(
                self._observer.look, manifest, self._attempts.verdicts(self.snapshot.desired)
            )
            if generation == self._generation:
                return look, generation

    async def _read_manifest(self) -> Manifest:
        """The manifest in force, after another look at its file."""
        manifest = await asyncio.to_thread(self._manifest_file.read)
        self._published.change(manifest_error=self._manifest_file.error)
        return manifest

    async def _stop_unwanted_build(self, look: Look) -> bool:
        """Whether there was one."""
        running = self.snapshot.building
        if running is None:
            return False
        wanted = look.desired.fingerprint(running.key)
        if wanted is not None and wanted.digest == running.fingerprint:
            return False
        log.info(
            "build stopped",
            model=running.key.model,
            prompt=running.key.prompt,
            reason="no longer wanted",
        )
        if wanted is not None:
            self._patience.stopped(running.key, wanted.digest, asyncio.get_running_loop().time())
        await self._stop_build()
        return True

    def _builds_to_do(
        self, look: Look, requested: list[Key], building: Key | None
    ) -> dict[Key, Build]:
        """Requested builds first, then the plan's; without the one that ran when the look saw the store.

        That one may have ended since: what the look saw of it is then out of date, and the next look comes at once.
        """
        builds = {}
        for key in requested:
            if (wanted := look.desired.fingerprint(key)) is not None:
                builds[key] = Build(key=key, reason=REQUESTED, fingerprint=wanted)
            else:
                error = errors.SourceError(
                    f"{key} can no longer be built", hint=f"see `rkcached explain {key}`"
                )
                self._requests.answer(key, error)
        for action in look.actions:
            if isinstance(action, Build):
                builds.setdefault(action.key, action)
        if building is not None:
            builds.pop(building, None)
        return builds

    def _publish(self, look: Look) -> None:
        artifacts = look.inventory.artifacts
        fresh = {}
        for assessment in look.assessments:
            artifact = artifacts.get(assessment.key)
            if assessment.state is State.FRESH and artifact is not None:
                fresh[assessment.key] = artifact
        if new := set(look.sources.skipped_files) - set(self.snapshot.skipped_files):
            log.info(
                "prompt files skipped",
                files=sorted(new),
                reason="their names cannot be a prompt's",
                hint="rename them to make prompts of them",
            )
        shown = {one.key: one for one in look.assessments if not one.retired}
        self._published.change(
            manifest=look.manifest,
            desired=look.desired,
            assessments=shown,
            artifacts=dict(artifacts),
            index=FreshIndex(fresh),
            unreadable_bytes={
                key: found.size_bytes for key, found in look.inventory.unreadable.items()
            },
            retired=dict(look.inventory.retired),
            foreign_bytes=sum(look.inventory.foreign.values()),
            quarantine_bytes=sum(look.inventory.quarantined.values()),
            skipped_files=look.sources.skipped_files,
            store_trouble=look.store_trouble,
        )
        for assessment in shown.values():
            self._announcer.state(assessment)
        self._announcer.forget_all_but(set(self.snapshot.assessments))
        unlisted = tuple(map(str, look.sources.unlisted_models.values()))
        self._announcer.notices((*look.desired.notices, *unlisted))

    def _retire_workers(self, look: Look) -> None:
        """Stop workers of models that are gone; a model that changed is replaced when it is next used."""
        wanted = {
            name for name, model in look.desired.models.items() if isinstance(model, DesiredModel)
        }
        for name in {worker.model.name for worker in self._workers.all()} - wanted:
            task = asyncio.create_task(self._retire_worker(name))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _retire_worker(self, name: str) -> None:
        """Apart from the look, which need not wait for the answers that are running."""
        async with self._gates.hold(name, Priority.BUILD):
            if not isinstance(self.snapshot.model(name), DesiredModel):
                self._workers.drop(name)

    # Acting

    async def _act(self, look: Look) -> set[Key]:
        """Carry out what the plan says but for the builds; returns the keys of what was done.

        What takes too long is left to the next look, which comes at once.
        """
        started, done = time.monotonic(), set[Key]()
        for action in look.actions:
            self._store.digests.steps += 1
            match action:
                case Remove(retired=fingerprint) if fingerprint:
                    changed = await self._remove_retired(action)
                case Remove():
                    changed = await self._remove(action, look)
                case Retire() if time.monotonic() - started < ACT_S:
                    changed = await self._retire(action, look)
                case Adopt() if time.monotonic() - started < ACT_S:
                    changed = await self._adopt(action, look)
                case Retire() | Adopt():
                    self.look_again(now=True)
                    continue
                case _:
                    continue
            if changed:
                done.add(action.key)
        return done

    def _may_change(self, key: Key, look: Look) -> bool:
        """Whether an artifact is as the look saw it: not if a build replaces it, or has."""
        snapshot = self.snapshot
        same = snapshot.artifacts.get(key) is look.inventory.artifacts.get(key)
        return same and not snapshot.is_building(key)

    async def _adopt(self, action: Adopt, look: Look) -> bool:
        """Publish an artifact that the store has under another name. Whether it was."""
        key, source = action.key, action.source
        if not self._may_change(key, look) or (
            source is not None and not self._may_change(source, look)
        ):
            return False

        try:
            artifact = await asyncio.to_thread(
                self._store.adopt,
                key,
                action.fingerprint.digest,
                source=source,
                take=action.take,
                retire=look.manifest.cache.keep_retired_s > 0,
            )
        except errors.StoreError as error:
            if key not in self._unadopted:
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
            self._published.put(self.snapshot.with_assessment(assessment))
            again = (
                key not in self._unadopted
            )  # the source may be out of use by now: the next look tells
            self._unadopted.add(key)
            return again
        self._unadopted.discard(key)
        if action.take and source is None:
            self._published.put(self.snapshot.without_retired(action.fingerprint.digest))
        elif action.take and source is not None:
            self._published.put(self.snapshot.without_artifact(source))

        log.info(
            "artifact adopted",
            model=key.model,
            prompt=key.prompt,
            state=State.FRESH.value,
            reason=action.reason,
            tokens=artifact.sidecar.tokens,
            size_bytes=artifact.sidecar.size_bytes,
        )
        self._attempts.built(key)
        self._is_fresh(key, artifact)
        return True

    async def _retire(self, action: Retire, look: Look) -> bool:
        """Put an artifact aside that is no longer declared. Whether it was."""
        if not self._may_change(action.key, look):
            return False
        try:
            if action.verdict is not None:
                await asyncio.to_thread(self._store.write_verdict, action.key, action.verdict)
            await asyncio.to_thread(self._store.retire, action.key)
        except errors.StoreError as error:
            _log_trouble("artifact not retired", action, error)
            return False
        self._published.put(self.snapshot.without_artifact(action.key))
        log.info(
            "artifact retired",
            model=action.key.model,
            prompt=action.key.prompt,
            reason=action.reason,
        )
        return True

    async def _remove_retired(self, action: Remove) -> bool:
        try:
            await asyncio.to_thread(self._store.remove_retired, action.retired)
        except errors.StoreError as error:
            _log_trouble("retired artifact not removed", action, error)
            return False
        self._published.put(self.snapshot.without_retired(action.retired))
        log.info(
            "retired artifact removed",
            model=action.key.model,
            prompt=action.key.prompt,
            reason=action.reason,
        )
        return True

    async def _remove(self, action: Remove, look: Look) -> bool:
        """Whether it was: not if it cannot be, nor if a build replaces what the look saw, or has."""
        key = action.key
        if not self._may_change(key, look):
            return False
        try:
            if action.verdict is not None:
                await asyncio.to_thread(self._store.write_verdict, key, action.verdict)
            await asyncio.to_thread(self._store.remove, key)
        except errors.StoreError as error:
            _log_trouble("artifact not removed", action, error)
            return False
        self._published.put(self.snapshot.without_artifact(key))
        log.info("artifact removed", model=key.model, prompt=key.prompt, reason=action.reason)
        return True

    async def _forget_verdicts(self, look: Look) -> None:
        for key in look.inventory.verdicts.keys() - look.desired.prompts.keys():
            if key.model not in look.sources.unlisted_models:
                await asyncio.to_thread(self._store.clear_verdict, key)

    def _start_next_build(self) -> None:
        while (
            self.snapshot.building is None
            and not self._looking
            and (build := self._next_build()) is not None
        ):
            request = self._build_request(build)
            if request is not None:
                self._last_started = build.key
                key, fingerprint = build.key, build.fingerprint.digest
                progress = BuildProgress(
                    key=key, reason=build.reason, fingerprint=fingerprint, started=time.monotonic()
                )
                self._published.change(building=progress)
                self._announcer.build_started(build)
                self._build_task = asyncio.create_task(self._build(request, progress))

    def _next_build(self) -> Build | None:
        """Take the first build that may begin now out of those that wait; if none may, come back when one may.

        A prompt that was just built lets another go first, unless somebody waits for it.
        """
        loop, asked = asyncio.get_running_loop(), self._requests.open()
        again: Key | None = None
        due_at = math.inf
        for key in self._pending:
            due = (
                0.0
                if key in asked
                else self._patience.due(key, self._files_of(key), self._watcher.writing)
            )
            if due > loop.time():
                due_at = min(due_at, due)
            elif key != self._last_started or key in asked:
                return self._pending.pop(key)
            else:
                again = key

        if again is not None:
            return self._pending.pop(again)
        if self._later is not None:
            self._later.cancel()
        if due_at < math.inf:
            self._later = loop.call_at(due_at, self._start_next_build)
        return None

    def _files_of(self, key: Key) -> Iterator[str]:
        """The files that a prompt and its model were made of when they were last looked at."""
        if (declared := self._declared.get(key)) is not None:
            yield from declared.files
        if isinstance(model := self.snapshot.model(key.model), DesiredModel):
            for path, _ in model.source.signatures:
                yield path

    def _build_request(self, build: Build) -> BuildRequest | None:
        """What the build needs; None if it is no longer what is wanted, which the next look takes care of."""
        key, snapshot = build.key, self.snapshot
        model, wanted = snapshot.model(key.model), snapshot.desired.fingerprint(key)
        if (
            not isinstance(model, DesiredModel)
            or wanted is None
            or wanted.digest != build.fingerprint.digest
        ):
            return None
        return BuildRequest(
            action=build,
            model=model,
            text=snapshot.desired.texts[key],
            engine=snapshot.manifest.engine,
            cache=snapshot.manifest.cache,
            claimed_bytes=snapshot.claimed_bytes(but=key),
            foreign_bytes=snapshot.foreign_bytes,
            needed_bytes=self._attempts.needed_bytes(key, wanted.digest)
            or size_if_same(snapshot.artifacts.get(key), wanted.components),
            first_try=self._attempts.first_try(
                build.fingerprint.digest, asyncio.get_running_loop().time()
            ),
        )

    async def _build(self, request: BuildRequest, progress: BuildProgress) -> None:
        key = request.action.key

        def on_progress(done: int, total: int) -> None:
            self._published.change(building=replace(progress, done_tokens=done, total_tokens=total))

        try:
            try:
                artifact = await self._builder.build(request, on_progress)
            finally:
                self._announcer.build_ended()
        except errors.Aborted:
            log.info("build stepped aside", model=key.model, prompt=key.prompt)
            self._pending = {key: request.action, **self._pending}
            self._last_started = None  # it goes on before others
        except errors.RkcachedError as error:
            await self._build_failed(request, error)
        except Exception as error:  # a defect of ours: reported, and no reason to stop serving
            log.exception("build crashed", model=key.model, prompt=key.prompt)
            await self._build_failed(request, errors.RkcachedError(f"internal error: {error!r}"))
        else:
            self._built(request, artifact)
        finally:
            self._published.change(building=None)
            self._generation += 1
        # With more builds waiting there is no need to look at everything again in between; and a
        # look that goes on takes notice by itself, for if each build asked for another one, there
        # would be no more than one to a look.
        if self._looking:
            return
        if self._pending and not self._wake.is_set():
            self._start_next_build()
        else:
            self.look_again(now=True)

    def _built(self, request: BuildRequest, artifact: StoredArtifact) -> None:
        key, sidecar = request.action.key, artifact.sidecar
        self._published.change(builds=self.snapshot.builds + 1)
        self._attempts.built(key)
        self._patience.built(key)
        self._announcer.built(request, artifact)
        self._is_fresh(key, artifact)
        self._requests.answer(key, artifact)

        # Prompts of the same text and parameters need no prefill any more: the next look adopts it
        # for them.
        twins = [
            other
            for other, build in self._pending.items()
            if build.fingerprint.digest == sidecar.fingerprint and build.reason != REQUESTED
        ]
        for other in twins:
            del self._pending[other]
        if twins:
            self.look_again(now=True)

    def _is_fresh(self, key: Key, artifact: StoredArtifact) -> None:
        """This artifact has just been published."""
        snapshot = self.snapshot.with_artifact(key, artifact)
        self._published.put(snapshot)
        if snapshot.index.get(key) is artifact:
            self._announcer.state(snapshot.assessments[key])

    async def _build_failed(self, request: BuildRequest, error: errors.RkcachedError) -> None:
        key, fingerprint = request.action.key, request.action.fingerprint.digest
        stored = await asyncio.to_thread(self._store.read_verdict, key)
        verdict = self._attempts.failed(key, request.model, fingerprint, error, stored)
        self._announcer.build_failed(request, error, verdict)
        if blames_model(error) or isinstance(error, errors.Uncacheable):
            self._pending = {k: build for k, build in self._pending.items() if k.model != key.model}
        if not blames_model(error):
            with contextlib.suppress(errors.StoreError):
                await asyncio.to_thread(self._store.write_verdict, key, verdict)
        self._requests.answer(key, error)

    async def _stop_build(self) -> None:
        if self.snapshot.building is not None and self._build_task is not None:
            self._build_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._build_task


def _log_trouble(event: str, action: Action, error: errors.StoreError) -> None:
    key = action.key
    log.error(event, model=key.model, prompt=key.prompt, error=error.message, hint=error.hint)
