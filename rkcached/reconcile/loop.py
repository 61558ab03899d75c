"""The reconciler: look, plan, act, until there is nothing to do.

It is the single writer of the store, and of the snapshot that others read.

It is level-triggered. Events, signals, timers and finished builds all mean the same, "look again";
what to do comes only from comparing the manifest with the disk. A look observes all of it
(`observer`), publishes what it saw (`publisher`), adopts, retires and removes (`actions`), and
fills the queue of builds (`build_queue`), which run one at a time (`build_runner`).

Everything here runs on the event loop except the observing, which reads files in a thread, one look
at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence

from rkcached import errors
from rkcached.host.logs import log
from rkcached.host.systemd import Service
from rkcached.host.trails import places
from rkcached.host.watch import Follower
from rkcached.plan.records import Build
from rkcached.reconcile.actions import Actor
from rkcached.reconcile.announcer import Announcer
from rkcached.reconcile.build_queue import REQUESTED, BuildQueue, next_retry_at
from rkcached.reconcile.build_runner import BuildRunner
from rkcached.reconcile.builder import Builder
from rkcached.reconcile.collection import Collection
from rkcached.reconcile.demand import Demand
from rkcached.reconcile.events import Events
from rkcached.reconcile.failures import QUARANTINE_AFTER, Failures, quarantined
from rkcached.reconcile.importer import Importer, Outcome
from rkcached.reconcile.observer import Observation, Observer
from rkcached.reconcile.publisher import Publisher
from rkcached.reconcile.snapshot import Published, Snapshot
from rkcached.reconcile.surplus import SurplusWorkers
from rkcached.reconcile.waiters import Waiters
from rkcached.reconcile.wake import Wake
from rkcached.sources.manifest import Manifest
from rkcached.sources.manifest_file import ManifestFile, inputs
from rkcached.sources.records import Key, Trouble
from rkcached.sources.stored_texts import StoredTexts
from rkcached.store.bundles import BundleReader
from rkcached.store.garbage import Rubbish
from rkcached.store.sidecar import StoredArtifact
from rkcached.store.store import Store
from rkcached.worker.gate import Gates
from rkcached.worker.pool import Workers

RESCAN_S = 60.0
"""Look at the latest this long after the last look: events can be lost."""

STORE_RETRY_S = 5.0
"""Look again after a look at a store that cannot be read."""

SHORTEST_WAIT_S = 0.05
"""Retries that are due do not make the loop spin."""


class Reconciler:
    """Makes the store equal to the manifest, and keeps it so."""

    def __init__(
        self,
        *,
        published: Published,
        wake: Wake,
        store: Store,
        stored: StoredTexts,
        workers: Workers,
        gates: Gates,
        watcher: Follower,
        events: Events,
        service: Service | None = None,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """`published` holds the manifest to begin with. `service` hears that the loop is alive.

        `on_turn` is called after each look, and now and then during the first.
        """
        self.ready = asyncio.Event()
        """Set once the first look is over and a plan exists."""
        self.demand = Demand()
        """Serving says here what requests ask for."""
        self._published = published
        self._wake = wake
        self._store = store
        self._stored = stored
        self._workers = workers
        self._watcher = watcher
        self._service = service or Service()
        self._on_turn = on_turn

        manifest = published.now.manifest
        self._manifest_file = ManifestFile(manifest.file, manifest)
        self._observer = Observer(store, stored)
        self._announcer = Announcer(events)
        self._publisher = Publisher(published, self._announcer)
        self._surplus = SurplusWorkers(workers, gates, published)
        self._failures = Failures()
        self._waiters = Waiters()
        self._queue = BuildQueue(self._rank)
        self._actor = Actor(
            store=store,
            published=published,
            announcer=self._announcer,
            failures=self._failures,
            wake=wake,
        )
        builder = Builder(store, workers, gates)
        self._builds = BuildRunner(
            store=store,
            builder=builder,
            queue=self._queue,
            failures=self._failures,
            waiters=self._waiters,
            announcer=self._announcer,
            published=published,
            watcher=watcher,
            wake=wake,
            gates=gates,
            on_end=self._changed_beside_a_look,
        )
        self._importer = Importer(
            store=store,
            builder=builder,
            builds=self._builds,
            published=published,
            next_look=self.next_look,
        )

        # Counts changes of the store that were made outside of a look.
        self._generation = 0
        # Who waits for a look that begins after the question.
        self._curious: list[asyncio.Event] = []
        self._collections: list[Collection] = []

    @property
    def snapshot(self) -> Snapshot:
        """Everything that others may know of all this, at this moment."""
        return self._published.now

    # What others may ask for; all on the event loop

    def look_again(self, changed: Iterable[str] = (), *, now: bool = False) -> None:
        """Something may have changed: these files, or nobody knows what.

        `now` skips waiting for it to settle.
        """
        self._wake.look_again(changed, now=now)

    async def next_look(self) -> None:
        """Return when a look that begins after this call has ended."""
        event = asyncio.Event()
        self._curious.append(event)
        self.look_again(now=True)
        await event.wait()

    async def regenerate(self, key: Key) -> StoredArtifact:
        """Build this prompt anew, even if it is fresh.

        Errors: SourceError if it has no text; what the build raises.
        """
        desired = self.snapshot.desired.prompts.get(key)
        if desired is None:
            hint = "`rkcached status` lists what is declared"
            raise errors.SourceError(f"{key} is not declared", hint=hint)
        if desired.fingerprint is None:
            trouble = desired.trouble or Trouble(message="it has no text")
            raise errors.SourceError(f"{key} cannot be built: {trouble.message}", hint=trouble.hint)

        self._failures.forgive_model(key.model)
        future = self._waiters.ask(key, anew=True)
        self.look_again(now=True)
        return await asyncio.shield(future)

    async def freshen(self, key: Key) -> StoredArtifact:
        """The artifact of a prompt whose text was just written. Errors: as regenerate."""
        future = self._waiters.ask(key, anew=False)
        self.look_again(now=True)
        return await asyncio.shield(future)

    @contextlib.contextmanager
    def hurrying(self, names: Sequence[str]) -> Iterator[None]:
        """Somebody waits for these prompts (`Hurried.waiting`): their builds are not held back."""
        with self._waiters.hurried.waiting(names):
            self._builds.start_next()
            yield

    async def forget(self, key: Key) -> None:
        """A text was deleted on purpose: its prompt caches go, too, and none is kept as retired.

        Errors: StoreError.
        """
        await self.next_look()
        await asyncio.to_thread(self._store.retired.remove_of, key)
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

    async def import_bundle(self, reader: BundleReader, *, prefill: bool) -> list[Outcome]:
        """As `Importer.run`."""
        return await self._importer.run(reader, prefill=prefill)

    async def artifact_failed(
        self, key: Key, artifact: StoredArtifact, why: str, *, died: bool
    ) -> None:
        """A fresh artifact could not be loaded for a request, which is answered cold. Heal it.

        A clean refusal takes the artifact out at once; a worker's death does after QUARANTINE_AFTER
        times, for it may have another cause. A fingerprint that fails that often is left alone
        until one of its inputs changes, or for a time that grows.
        """
        if self.snapshot.artifacts.get(key) != artifact:
            return  # replaced meanwhile

        fingerprint = artifact.sidecar.fingerprint
        faults = self._failures.load_fault(fingerprint)
        log.error(
            "artifact not loadable", model=key.model, prompt=key.prompt, why=why, times=faults
        )
        if died and faults < QUARANTINE_AFTER:
            return

        self._published.put(self.snapshot.unserved(key))
        self._changed_beside_a_look()
        with contextlib.suppress(errors.StoreError):
            await asyncio.to_thread(self._store.quarantine, key)
            if faults >= QUARANTINE_AFTER:
                verdict = quarantined(fingerprint, "loading it", faults, why)
                await asyncio.to_thread(self._store.verdicts.write, key, verdict)

        log.error("artifact quarantined", model=key.model, prompt=key.prompt, why=why)
        self.look_again(now=True)

    def artifact_served(self, artifact: StoredArtifact) -> None:
        """A request was answered from it."""
        self._failures.served(artifact.sidecar.fingerprint)

    # The loop

    async def run(self) -> None:
        """Reconcile until cancelled; then the running build is stopped without a trace."""
        try:
            while True:
                await self._wake.settle()
                await self._alive_during(self._glance_and_look())
                self._builds.start_next()
                self._on_turn()
                await self._wait()
        finally:
            self._importer.close()
            await self._builds.close()
            self._surplus.cancel()
            self._waiters.cancel()
            for collection in self._collections:
                collection.future.cancel()

    async def _wait(self) -> None:
        """Return when something wakes us, or the next retry or rescan is due."""
        snapshot = self.snapshot
        loop = asyncio.get_running_loop()
        rescan_s = RESCAN_S if snapshot.store_trouble is None else STORE_RETRY_S
        retry_s = next_retry_at(snapshot.assessments.values()) - time.time()
        end = loop.time() + max(SHORTEST_WAIT_S, min(rescan_s, retry_s))

        while loop.time() < end:
            building = self.snapshot.building
            if building is None or not self._workers.overdue(building.started):
                self._service.beat()

            left_s = end - loop.time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, self._service.pulse_s or left_s)):
                    await self._wake.wait()
                    return

    async def _alive_during(self, look: Coroutine[None, None, None]) -> None:
        """Wait for a look, which may read large files for minutes; alive is one that gets on."""
        task = asyncio.create_task(look)
        steps = self._store.digests.steps
        try:
            while not (await asyncio.wait({task}, timeout=self._service.pulse_s))[0]:
                if self._store.digests.steps == steps:
                    continue
                steps = self._store.digests.steps
                self._service.beat()
                if not self.ready.is_set():
                    self._on_turn()
        except asyncio.CancelledError:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            raise
        task.result()

    def _rank(self, key: Key) -> tuple[float, ...]:
        """Declared prompts are built before learned ones; first those that are asked for most."""
        return (float(key in self.snapshot.desired.learned), *self.demand.rank(key))

    def _changed_beside_a_look(self) -> None:
        """A build or a request changed the store, or found something out about it."""
        self._generation += 1

    async def _read_manifest(self) -> Manifest:
        """The manifest in force, after another look at its file."""
        manifest = await asyncio.to_thread(self._manifest_file.read)
        self._published.change(manifest_error=self._manifest_file.error)
        return manifest

    # A glance

    async def _glance_and_look(self) -> None:
        changed = self._wake.take_changed()
        if changed and self.snapshot.building is None:
            await self._glance(changed)
        await self._look()

    async def _glance(self, changed: set[str]) -> None:
        """Start the build of an edited prompt at once.

        With thousands of prompts, a look takes long. It is the look that decides: a build that it
        does not want is stopped.
        """
        before = self.snapshot
        generation = self._generation
        manifest = await self._read_manifest()
        if manifest is not before.manifest or before.store_trouble is not None:
            return

        glimpses = [
            glimpse
            for glimpse in await asyncio.to_thread(
                self._observer.glance, manifest, changed, before.index.all()
            )
            if not self._failures.blames(glimpse.prompt.key.model)
        ]
        if not glimpses or generation != self._generation:
            return

        self._publisher.glimpses(glimpses)
        self._queue.put_first(glimpse.build for glimpse in glimpses)
        self._builds.start_next()

    # A look

    async def _look(self) -> None:
        started = time.perf_counter()
        asked = self._waiters.asked()
        curious, self._curious = self._curious, []
        collections, self._collections = self._collections, []

        self._builds.paused = True  # a build may end while we look, but no other starts
        try:
            observation, generation = await self._observe()
            acted = await self._act(observation, asked, collections)
        finally:
            self._builds.paused = False

        for event in curious:
            event.set()
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self._store.digests.save)

        took_ms = (time.perf_counter() - started) * 1000
        looks = self.snapshot.looks + 1
        self._published.change(looks=looks, last_look_ms=took_ms, ready=True)
        self.ready.set()
        log.debug("looked", took_ms=round(took_ms, 1), builds=len(self._queue), changed=len(acted))

        # What cannot be removed is tried again at the next look, not at once.
        if acted or generation != self._generation:
            self.look_again(now=True)
        if generation != self._generation:
            # A build or a request found something out since: the next look plans with that.
            self._queue.clear()

    async def _observe(self) -> tuple[Observation, int]:
        """Observe while the store does not change; returns the generation of that time, too.

        As no build starts meanwhile, two attempts are the most.
        """
        while True:
            generation = self._generation
            manifest = await self._read_manifest()
            verdicts = self._failures.verdicts(self.snapshot.desired)
            observation = await asyncio.to_thread(self._observer.observe, manifest, verdicts)
            if generation == self._generation:
                return observation, generation

    async def _act(
        self, observation: Observation, asked: Iterable[Key], collections: Iterable[Collection]
    ) -> set[Key]:
        """Publish what was seen, do what the plan asks for, and queue the builds.

        Returns the keys of what was adopted, retired and removed.
        """
        running = self.snapshot.building
        building = running.key if running is not None else None

        self._publisher.look(observation)
        self._builds.declared = observation.sources.prompts
        self._queue.observed(observation.desired.fingerprint, asyncio.get_running_loop().time())
        files, folders = inputs(observation.manifest, self._stored)
        self._watcher.follow(await asyncio.to_thread(places, files, folders))
        self._surplus.stop(observation.desired.models)

        for collection in collections:
            await collection.find(self._store, observation, building, (files, folders))
        if await self._builds.stop_unwanted(observation):
            building = None
        acted = await self._actor.act(observation)
        for collection in collections:
            await collection.finish(self._store, acted)

        await self._tidy(observation)
        anew = self._waiters.observed(asked, self.snapshot.assessments, self.snapshot.artifacts)
        requested = self._requested(anew, observation)
        self._queue.plan(requested, observation.actions, but=building)
        await self._forget_verdicts(observation)
        return acted

    async def _tidy(self, observation: Observation) -> None:
        """Remove what is left over in the store; the quarantine keeps what the budget leaves it."""
        limit = observation.manifest.cache.max_bytes
        room = math.inf if limit is None else max(0, limit - self.snapshot.used_bytes())
        with contextlib.suppress(errors.StoreError):
            await asyncio.to_thread(self._store.tidy, observation.inventory, room)

        quarantine_bytes = sum(observation.inventory.quarantined.values())
        self._published.change(quarantine_bytes=quarantine_bytes)

    def _requested(self, keys: Iterable[Key], observation: Observation) -> list[Build]:
        """The builds that somebody asked for; who asks for one that cannot be is answered."""
        builds = []
        for key in keys:
            wanted = observation.desired.fingerprint(key)
            if wanted is not None:
                builds.append(Build(key=key, reason=REQUESTED, fingerprint=wanted))
                continue
            hint = f"see `rkcached explain {key}`"
            error = errors.SourceError(f"{key} can no longer be built", hint=hint)
            self._waiters.answer(key, error)
        return builds

    async def _forget_verdicts(self, observation: Observation) -> None:
        """Remove verdicts on prompts that are not declared any more."""
        undeclared = observation.inventory.verdicts.keys() - observation.desired.prompts.keys()
        for key in undeclared:
            if key.model not in observation.sources.unlisted_models:
                await asyncio.to_thread(self._store.verdicts.clear, key)
