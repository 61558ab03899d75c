"""Runs the builds of the queue, one at a time, and says what becomes of each.

The queue decides which build is next, the builder carries it out. A build never starts while a look
acts (`paused`), but one may end then. On the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import replace

from rkcached import errors
from rkcached.host.logs import log
from rkcached.host.watch import Follower
from rkcached.plan.desired import DesiredModel
from rkcached.plan.records import Build
from rkcached.reconcile.actions import publish_artifact
from rkcached.reconcile.announcer import Announcer
from rkcached.reconcile.build_queue import BuildQueue
from rkcached.reconcile.build_request import BuildRequest
from rkcached.reconcile.build_times import Hold, hold
from rkcached.reconcile.builder import Builder, size_if_same
from rkcached.reconcile.failures import Failures, blames_model
from rkcached.reconcile.observer import Observation
from rkcached.reconcile.snapshot import BuildProgress, Published
from rkcached.reconcile.waiters import Waiters
from rkcached.reconcile.wake import Wake
from rkcached.sources.records import Declaration, Key
from rkcached.store.sidecar import StoredArtifact
from rkcached.store.store import Store
from rkcached.worker.gate import Gates

# What builds wait for while they have lent their place.
_FOR_IMPORT = "for an import"


class BuildRunner:
    """Takes builds from the queue while there are any."""

    def __init__(
        self,
        *,
        store: Store,
        builder: Builder,
        queue: BuildQueue,
        failures: Failures,
        waiters: Waiters,
        announcer: Announcer,
        published: Published,
        watcher: Follower,
        wake: Wake,
        gates: Gates,
        on_end: Callable[[], None],
    ) -> None:
        """`on_end` is called when a build has ended, before anything follows from that."""
        self.paused = False
        """A look is going on, and will start what it wants itself."""
        self.declared: Mapping[Key, Declaration] = {}
        """By the last look."""
        self._store = store
        self._builder = builder
        self._queue = queue
        self._failures = failures
        self._waiters = waiters
        self._announcer = announcer
        self._published = published
        self._watcher = watcher
        self._wake = wake
        self._gates = gates
        self._on_end = on_end
        # An import has the builds' place, and whoever wants to import next waits.
        self._lending = asyncio.Lock()
        self._task: asyncio.Task[None] | asyncio.Task[StoredArtifact] | None = None
        # Starts a build that must wait until then.
        self._later: asyncio.TimerHandle | None = None
        gates.when_quiet(self.start_next)

    # Starting

    def start_next(self) -> None:
        """Start the first build that may begin now, unless one is running.

        If none may, this is called again when one may.
        """
        while not (self.paused or self._lending.locked() or self._published.now.building):
            build = self._next()
            if build is None:
                return
            request = self._request(build)
            if request is not None:
                self._start(request)

    def _next(self) -> Build | None:
        loop = asyncio.get_running_loop()
        config = self._published.now.manifest.cache.build
        held = hold(config, time.time(), self._gates.quiet_s())
        build, due_at = self._queue.next(
            loop.time(),
            self._waiters.asked(),
            self._files_of,
            self._watcher.writing,
            held_until=loop.time() + held.for_s if held is not None else 0.0,
            hurried=self._waiters.hurried,
        )
        self._tell_held(held if len(self._queue) else None)
        if build is not None:
            return build

        if self._later is not None:
            self._later.cancel()
        if due_at < math.inf:
            self._later = loop.call_at(due_at, self.start_next)
        return None

    def _tell_held(self, held: Hold | None) -> None:
        why = held.why if held is not None else ""
        if why != self._published.now.held:
            self._published.change(held=why)
            if why:
                log.info("builds wait", why=why, builds=len(self._queue))

    def _files_of(self, key: Key) -> Iterator[str]:
        """The files that a prompt and its model were made of when they were last looked at."""
        declared = self.declared.get(key)
        if declared is not None:
            yield from declared.files

        model = self._published.now.model(key.model)
        if isinstance(model, DesiredModel):
            for path, _ in model.source.signatures:
                yield path

    def _request(self, build: Build) -> BuildRequest | None:
        """Everything that the build needs; None if it is not what is wanted any more.

        The next look takes care of that.
        """
        key = build.key
        snapshot = self._published.now
        model = snapshot.model(key.model)
        wanted = snapshot.desired.fingerprint(key)
        if not isinstance(model, DesiredModel) or wanted is None:
            return None
        if wanted.digest != build.fingerprint.digest:
            return None

        needed_bytes = self._failures.needed_bytes(key, wanted.digest)
        if not needed_bytes:
            needed_bytes = size_if_same(snapshot.artifacts.get(key), wanted.components)
        first_try = self._failures.first_try(wanted.digest, asyncio.get_running_loop().time())
        return BuildRequest(
            action=build,
            model=model,
            text=snapshot.desired.texts[key],
            tools=snapshot.desired.prompts[key].tools,
            engine=snapshot.manifest.engine,
            cache=snapshot.manifest.cache,
            claimed_bytes=snapshot.claimed_bytes(but=key),
            foreign_bytes=snapshot.foreign_bytes,
            needed_bytes=needed_bytes,
            first_try=first_try,
            index=snapshot.index,
        )

    def _start(self, request: BuildRequest) -> None:
        build = request.action
        progress = BuildProgress(
            key=build.key,
            reason=build.reason,
            fingerprint=build.fingerprint.digest,
            started=time.monotonic(),
        )
        self._queue.started(build.key)
        self._published.change(building=progress)
        self._announcer.build_started(build)
        self._task = asyncio.create_task(self._run(request, progress))

    # Running

    async def _run(self, request: BuildRequest, progress: BuildProgress) -> None:
        key = request.action.key

        def on_progress(done: int, total: int) -> None:
            nonlocal progress
            costs = self._builder.costs(request.model)
            progress = replace(
                progress.read(done, total, time.monotonic()),
                proof_s=costs.proof_s,
                aside_s=costs.aside_s,
                keeps_state=costs.keeps_state,
            )
            self._published.change(building=progress)

        try:
            try:
                artifact = await self._builder.build(request, on_progress)
            finally:
                self._announcer.build_ended()
        except errors.Aborted:
            log.info("build stepped aside", **key._asdict())
            self._queue.step_aside(request.action)
        except errors.RkcachedError as error:
            await self._failed(request, error)
        except Exception as error:  # a defect of ours: reported, and no reason to stop serving
            log.exception("build crashed", **key._asdict())
            await self._failed(request, errors.RkcachedError(f"internal error: {error!r}"))
        else:
            self._built(request, artifact)
        finally:
            self._published.change(building=None)
            self._on_end()

        self._go_on()

    def _go_on(self) -> None:
        """Start the next build, or ask for a look.

        With more builds waiting there is no need to look at everything in between. A look that is
        going on takes notice by itself: if each build asked for another one, there would be no more
        than one build to a look.
        """
        if self.paused:
            return
        if len(self._queue) and not self._wake.is_set():
            self.start_next()
        else:
            self._wake.look_again(now=True)

    def _built(self, request: BuildRequest, artifact: StoredArtifact) -> None:
        self._published.change(builds=self._published.now.builds + 1)
        self._announcer.built(request, artifact)
        self._publish(request.action.key, artifact)

    def _publish(self, key: Key, artifact: StoredArtifact) -> None:
        self._failures.built(key)
        self._queue.built(key)
        publish_artifact(self._published, self._announcer, key, artifact)
        self._waiters.answer(key, artifact)

        # Prompts of the same text and parameters need no prefill any more: the next look adopts it
        # for them.
        if self._queue.drop_twins(artifact.sidecar.fingerprint):
            self._wake.look_again(now=True)

    async def _failed(self, request: BuildRequest, error: errors.RkcachedError) -> None:
        key = request.action.key
        stored = await asyncio.to_thread(self._store.verdicts.read, key)
        verdict = self._failures.failed(
            key, request.model, request.action.fingerprint.digest, error, stored
        )
        self._announcer.build_failed(request, error, verdict)

        if blames_model(error) or isinstance(error, errors.Uncacheable):
            self._queue.drop_model(key.model)
        if not blames_model(error):
            with contextlib.suppress(errors.StoreError):
                await asyncio.to_thread(self._store.verdicts.write, key, verdict)
        self._waiters.answer(key, error)

    # Importing

    @contextlib.asynccontextmanager
    async def lent(self) -> AsyncIterator[None]:
        """Stop the build that is running, and start none: an import may make it needless."""
        async with self._lending:
            try:
                await self._stop_task()
                self._published.change(held=_FOR_IMPORT)
                yield
            finally:
                self._published.change(held="")
                self._wake.look_again(now=True)

    async def run_import(
        self,
        build: Build,
        take: Callable[[BuildRequest], Coroutine[None, None, StoredArtifact]],
    ) -> StoredArtifact:
        """Have `take` publish an artifact that was not built here, in the place of a build.

        Within `lent`. Errors: SourceError if it is no longer wanted, and those of `take`. A failure
        is no verdict on the prompt: it can be built as before.
        """
        key = build.key
        request = self._request(build)
        if request is None:
            raise errors.SourceError(
                f"{key} was changed meanwhile, or is no longer declared",
                hint="import the bundle again",
            )

        progress = BuildProgress(
            key=key,
            reason=build.reason,
            fingerprint=build.fingerprint.digest,
            started=time.monotonic(),
        )
        self._published.change(building=progress)
        self._announcer.build_started(build)
        task = self._task = asyncio.create_task(take(request))
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()  # unless it has ended, who imports has gone
            await asyncio.wait({task})
            self._announcer.build_ended()
            self._published.change(building=None)
            self._on_end()

        if task.cancelled():
            raise errors.SourceError(f"the import of {key} was stopped")
        artifact = task.result()
        self._announcer.imported(key, artifact)
        self._publish(key, artifact)
        return artifact

    # Stopping

    async def stop_unwanted(self, observation: Observation) -> bool:
        """Stop the running build if a look found that it is not wanted. Returns whether it did."""
        self._builder.forget_partial(observation.desired.fingerprint)
        running = self._published.now.building
        if running is None:
            return False
        wanted = observation.desired.fingerprint(running.key)
        if wanted is not None and wanted.digest == running.fingerprint:
            return False

        log.info(
            "build stopped",
            **running.key._asdict(),
            reason="no longer wanted",
        )
        if wanted is not None:
            now = asyncio.get_running_loop().time()
            self._queue.stopped(running.key, wanted.digest, now)
        await self._stop_task()
        return True

    async def close(self) -> None:
        """Stop the build that is running; nothing of it is left. Start no other."""
        self.paused = True
        if self._later is not None:
            self._later.cancel()
        await self._stop_task()
        self._builder.close()

    async def _stop_task(self) -> None:
        if self._published.now.building is not None and self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
