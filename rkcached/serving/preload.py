"""Keeps models and prompt caches in memory that the manifest wants there (`preload`).

A model that has `preload` is loaded after the first look, when it changed, and after its worker
died. The cache of its first preloaded prompt is kept in the KV state: when nobody has asked for a
moment, it is loaded again, unless the state still begins with it. The files of the others are read
once, so that the kernel has them in memory.

It yields to everybody: it waits for its turn as a build does, and does nothing while a request
waits. Where not all models fit, a model comes before those below it in the manifest and before
those without `preload`, but one that requests use is left alone until nobody has asked for a while.
Like the reconciler it is level-triggered: an event only makes it look. On the
event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from rkcached import errors
from rkcached.host.digests import Signature
from rkcached.host.logs import log
from rkcached.host.page_cache import read_ahead
from rkcached.plan.desired import DesiredModel
from rkcached.plan.worker_model import worker_model
from rkcached.reconcile.events import Event, Events
from rkcached.reconcile.loop import Reconciler
from rkcached.reconcile.snapshot import Published
from rkcached.serving.reuse import cache_file
from rkcached.sources.records import Key
from rkcached.store.sidecar import StoredArtifact
from rkcached.worker import protocol
from rkcached.worker.gate import Gates, Priority
from rkcached.worker.model import WorkerModel
from rkcached.worker.pool import Workers
from rkcached.worker.supervisor import Worker, WorkerState

QUIET_S = 2.0
"""Nobody has asked for so long before the engine goes back to the preloaded prompt."""

RETURN_S = 60.0
"""Nobody has asked for so long before another model is unloaded for one that has `preload`."""

MOST_FAILURES = 3
"""A model that could not be loaded so often is left to the next request."""


@dataclass(slots=True)
class _Known:
    """The record of one model that has `preload`."""

    hosted: WorkerModel
    tried: bool = False
    """Loading it was tried at least once, or there is no room for it."""
    was_loaded: bool = False
    """Since it is declared so. What unloaded it then had a reason."""
    failures: int = 0
    """In a row."""
    trouble: str = ""
    """Why it is not loaded."""
    ready: tuple[int | None, str] | None = None
    """The process and the fingerprint of the prompt cache that it has in its state; None if other
    work may have changed the state."""
    read: set[Signature] = field(default_factory=set)
    """The files that were read."""


class Preloader:
    """Call `look` after each look of the reconciler."""

    def __init__(
        self, published: Published, workers: Workers, gates: Gates, events: Events
    ) -> None:
        self.tried = asyncio.Event()
        """Set once every model that has `preload` is loaded, or could not be."""
        self._published = published
        self._workers = workers
        self._gates = gates
        self._known: dict[str, _Known] = {}
        # The model that we ourselves work with: its worker's events are no news.
        self._own = ""
        self._looking = asyncio.Event()
        gates.when_quiet(self.look)
        events.listen(self._take)

    def look(self) -> None:
        """Something may have to be loaded."""
        self._looking.set()

    def trouble(self, model: str) -> str:
        """Why a model with `preload` is not loaded; empty if nothing went wrong."""
        known = self._known.get(model)
        return known.trouble if known is not None else ""

    async def run(self, reconciler: Reconciler) -> None:
        """Load what is to be loaded, until cancelled."""
        await reconciler.ready.wait()
        while True:
            self._looking.clear()
            try:
                wait_s = await self._round(reconciler)
            except Exception:  # a defect of ours: reported, and no reason to stop serving
                log.exception("preloading failed")
                wait_s = None
                self.tried.set()

            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._looking.wait()

    # Looking

    def _take(self, event: Event) -> None:
        if event.kind == "worker" and event.fields["model"] != self._own:
            known = self._known.get(event.fields["model"])
            if known is not None:
                known.ready = None
        if event.kind in ("worker", "artifact", "build"):
            self.look()

    async def _round(self, reconciler: Reconciler) -> float | None:
        """Load what can be loaded now. Returns the seconds until there is more to do, if any."""
        waits: list[float] = []
        for model in self._wanted():
            known = self._known[model.name]
            after_s = self._after_s(model, known)
            if after_s == 0:
                await self._load(reconciler, model.name)
                after_s = self._after_s(model, known)
                if after_s is not None:
                    after_s = max(after_s, QUIET_S)
            if after_s is not None:
                waits.append(after_s)

        if all(self._known[model.name].tried for model in self._wanted()):
            self.tried.set()
        for model in self._wanted():
            await self._read_files(model)
        return min(waits, default=None)

    def _wanted(self) -> list[DesiredModel]:
        """The models to be loaded, in the manifest's order; each is known."""
        snapshot = self._published.now
        models = [
            model
            for model in snapshot.desired.models.values()
            if isinstance(model, DesiredModel) and model.config.preload is not None
        ]
        known = {}
        for model in models:
            hosted = worker_model(snapshot.manifest.engine, model)
            before = self._known.get(model.name)
            same = before is not None and before.hosted == hosted
            known[model.name] = before if before is not None and same else _Known(hosted)

        self._known = known
        return models

    def _after_s(self, model: DesiredModel, known: _Known) -> float | None:
        """In so many seconds there is something to do for a model; None: nothing, for now."""
        worker = self._workers.of(model.name)
        if worker is not None and worker.info is not None and worker.model == known.hosted:
            known.tried = known.was_loaded = True
            known.failures = 0
            known.trouble = ""
            if not self._lacks_prompt(model, known, worker):
                return None
            return self._quiet_in_s(QUIET_S)

        if known.failures >= MOST_FAILURES:
            return None
        if worker is not None and worker.model == known.hosted:
            if worker.state is WorkerState.STARTING:
                return None  # whoever starts it loads it
            if worker.state is WorkerState.STOPPED and known.was_loaded and not worker.made_room:
                return None  # it was unloaded on purpose
            retry_in_s = worker.retry_in_s()
            if retry_in_s > 0:
                return retry_in_s
            others = self._others(worker)
            if others is None or others:
                known.tried = True
                if others is None or self._published.now.building is not None:
                    return None
                return self._quiet_in_s(RETURN_S)

        return self._quiet_in_s(QUIET_S) if known.tried else 0.0

    def _quiet_in_s(self, moment_s: float) -> float | None:
        """The seconds until nobody has asked for this long; None while somebody asks."""
        quiet_s = self._gates.quiet_s()
        return None if quiet_s is None else max(0.0, moment_s - quiet_s)

    def _others(self, worker: Worker) -> list[Worker] | None:
        """The idle models to unload for this one; None if there is no room all the same."""
        earlier = itertools.takewhile(lambda name: name != worker.model.name, self._known)
        return self._workers.to_unload_for(worker, keep=set(earlier))

    def _lacks_prompt(self, model: DesiredModel, known: _Known, worker: Worker) -> bool:
        """Whether the KV state may lack the first preloaded prompt, whose cache is fresh."""
        found = self._first_prompt(model)
        building = self._published.now.building
        if found is None or worker.info is None or not worker.info.keeps_state:
            return False
        if building is not None and building.key.model == model.name:
            return False  # it would replace the state again

        _, artifact = found
        return known.ready != (worker.pid, artifact.sidecar.fingerprint)

    def _first_prompt(self, model: DesiredModel) -> tuple[Key, StoredArtifact] | None:
        return next(self._prompts(model, slice(0, 1)), None)

    def _prompts(self, model: DesiredModel, which: slice) -> Iterator[tuple[Key, StoredArtifact]]:
        """Of these preloaded prompts, those whose prompt caches are fresh."""
        index = self._published.now.index
        for name in (model.config.preload or ())[which]:
            key = Key(model.name, name)
            artifact = index.get(key)
            if artifact is not None:
                yield key, artifact

    # Loading

    async def _load(self, reconciler: Reconciler, name: str) -> None:
        """Load a model and its first prompt, if that is still wanted when its turn comes."""
        concurrent = self._published.now.manifest.engine.concurrent
        async with self._gates.hold(name, Priority.BUILD, concurrent=concurrent):
            snapshot = self._published.now
            model = snapshot.model(name)
            known = self._known[name]
            if not isinstance(model, DesiredModel):
                return
            if worker_model(snapshot.manifest.engine, model) != known.hosted:
                return  # it changed while we waited; we are called again after that look
            if known.tried and self._gates.quiet_s() is None:
                return  # somebody asks; we are called again when it is quiet

            self._own = name
            try:
                await self._load_model(reconciler, known)
                if self._gates.quiet_s() is not None:
                    await self._load_prompt(reconciler, model, known)
            finally:
                self._own = ""

    async def _load_model(self, reconciler: Reconciler, known: _Known) -> None:
        worker = self._workers.get(known.hosted)
        if worker.info is not None:
            return
        if known.tried:
            for other in self._others(worker) or ():
                log.info(
                    "model unloaded",
                    model=other.model.name,
                    reason=f"preload of {worker.model.name}",
                )
                await other.make_room()
        known.tried = True
        if self._others(worker) != []:
            return

        try:
            await worker.ensure()
        except errors.RkcachedError as error:
            known.failures += 1
            # What the engine refuses, it refuses again.
            if isinstance(error, errors.EngineError):
                known.failures = MOST_FAILURES
            known.trouble = error.message
            log.warning(
                "model not preloaded", model=worker.model.name, error=error.message, hint=error.hint
            )
            if isinstance(error, errors.ModelReplaced):
                reconciler.look_again(now=True)
        else:
            known.was_loaded = True

    async def _load_prompt(
        self, reconciler: Reconciler, model: DesiredModel, known: _Known
    ) -> None:
        worker = self._workers.get(known.hosted)
        found = self._first_prompt(model)
        if found is None or worker.info is None or not self._lacks_prompt(model, known, worker):
            return

        key, artifact = found
        cache = cache_file(artifact)
        known.ready = (worker.pid, artifact.sidecar.fingerprint)
        if cache is None:
            return

        operation = protocol.Check(cache=cache, text=artifact.text.decode())
        events: list[protocol.FromWorker] = []
        try:
            await worker.run(operation, events.append)
        except errors.RkcachedError as error:
            await _blame(reconciler, key, artifact, events, error)
            return
        for event in events:
            if isinstance(event, protocol.Loaded):
                log.info("prompt preloaded", **key._asdict(), load_ms=round(event.load_ms, 1))

    async def _read_files(self, model: DesiredModel) -> None:
        """Have the kernel read the prompt caches that are not in the KV state."""
        known = self._known.get(model.name)
        worker = self._workers.of(model.name)
        keeps_state = worker is None or worker.info is None or worker.info.keeps_state
        which = slice(1 if keeps_state else 0, None)
        for key, artifact in self._prompts(model, which):
            signature = artifact.signature
            if known is None or signature is None or signature in known.read:
                continue

            known.read.add(signature)
            if await asyncio.to_thread(read_ahead, artifact.path):
                log.debug("prompt cache read", **key._asdict(), bytes=artifact.size_bytes)


async def _blame(
    reconciler: Reconciler,
    key: Key,
    artifact: StoredArtifact,
    events: list[protocol.FromWorker],
    error: errors.RkcachedError,
) -> None:
    """Have the prompt cache looked at, if loading it failed by its fault."""
    match [event for event in events if isinstance(event, protocol.Loading | protocol.Loaded)]:
        case [protocol.Loading()] if isinstance(error, errors.WorkerDied | errors.WorkerTimeout):
            await reconciler.artifact_failed(key, artifact, error.message, died=True)
        case [*_, protocol.Loaded(replaced=True)]:
            reconciler.look_again(now=True)
        case [*_, protocol.Loaded()]:
            await reconciler.artifact_failed(key, artifact, error.message, died=False)
        case _:
            pass
