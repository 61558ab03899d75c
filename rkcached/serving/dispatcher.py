"""Answers a request: wait for its turn, pick the prompt cache, run, measure.

A request never waits for a rebuild. If the wanted prompt cache is stale or missing, or fails to
load, the answer is computed without it, from the prompt's current text. The engine's measurements
decide whether an answer was a hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import msgspec

from rkcached import errors
from rkcached.engines.base import EngineInfo, RunStats
from rkcached.errors import RequestError
from rkcached.host.logs import log
from rkcached.plan.desired import DesiredModel
from rkcached.plan.records import State
from rkcached.plan.worker_model import worker_model
from rkcached.reconcile.events import Events
from rkcached.reconcile.loop import Reconciler
from rkcached.serving.conversations import Conversations
from rkcached.serving.deadly import DeadlyRequests
from rkcached.serving.failures import (
    as_request_error,
    refuse_beyond_the_queue,
    stopping,
    timed_out,
)
from rkcached.serving.job import End, Job, Progress, Text
from rkcached.serving.models import find_model
from rkcached.serving.ongoing import Ongoing
from rkcached.serving.reuse import Found, cache_file, find, load_bytes
from rkcached.serving.tally import OnAnswer, Tally
from rkcached.serving.unsupported import without_unsupported
from rkcached.serving.waiting import sooner_to_wait
from rkcached.sources.records import Key
from rkcached.worker import protocol
from rkcached.worker.gate import Gates, Priority
from rkcached.worker.held import NOBODY
from rkcached.worker.pool import Workers
from rkcached.worker.supervisor import Worker

BACKOFF_PATIENCE_S = 2.0
"""A request waits for a worker in backoff for this long, before it is refused."""


class Serving:
    def __init__(
        self,
        *,
        reconciler: Reconciler,
        workers: Workers,
        gates: Gates,
        events: Events,
        conversations: Conversations,
        on_answer: Sequence[OnAnswer] = (),
    ) -> None:
        """Each of `on_answer` is called with each request that was answered, and how."""
        self._conversations = conversations
        self._reconciler = reconciler
        self._workers = workers
        self._gates = gates
        self.tally = Tally(reconciler, events, on_answer)
        self._works: dict[asyncio.Task[RunStats], Ongoing] = {}
        self._deadly = DeadlyRequests()
        self._closing = False
        self._background: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> int:
        """Requests that are being answered or wait for their turn."""
        return len(self._works)

    def waiting(self, model: str) -> int:
        """Requests that wait for their turn."""
        return sum(
            1
            for ongoing in self._works.values()
            if ongoing.job.model.name == model and not ongoing.started
        )

    async def close(self, grace_s: float) -> None:
        """Refuse new requests, give those that run `grace_s` seconds to end, then end them."""
        self._closing = True
        log.debug("new requests are refused", running=len(self._works))
        if self._works:
            await asyncio.wait(self._works, timeout=grace_s)

        for work, ongoing in self._works.items():
            work.cancel()
            # The client gets its error now: the work may hang in a library.
            ongoing.pieces.put_nowait(None)

    # Models

    async def load(self, name: str) -> None:
        """Load a model now. Errors: RequestError."""
        model = find_model(self._reconciler.snapshot, name)
        engine = self._reconciler.snapshot.manifest.engine
        try:
            async with self._turn(name):
                await self._workers.get(worker_model(engine, model)).ensure()
        except errors.RkcachedError as error:
            raise as_request_error(error) from error

    async def unload(self, name: str) -> None:
        """Unload a model when its turn comes. The next request loads it again.

        Errors: RequestError.
        """
        find_model(self._reconciler.snapshot, name)
        async with self._turn(name):
            for worker in self._workers.all():
                if worker.model.name == name:
                    await worker.stop()

    async def tokenize(self, name: str, text: str, caller: int) -> Sequence[int]:
        """The tokens of a text, as the model reads it. Errors: RequestError."""
        model = find_model(self._reconciler.snapshot, name)
        engine = self._reconciler.snapshot.manifest.engine
        try:
            async with self._turn(name, caller):
                worker = self._workers.get(worker_model(engine, model))
                result = await _uninterrupted(worker.run(protocol.Tokenize(text=text)))
        except errors.RkcachedError as error:
            raise as_request_error(error, text_param="content") from error

        if not isinstance(result, protocol.Tokenized):
            raise TypeError(result)
        if result.tokens is None:
            raise errors.RequestError(
                404,
                f"rkcached knows no tokenizer for the model {name!r}",
                code="not_tokenized",
                hint="set the model's `tokenizer` in the manifest",
            )
        return result.tokens

    async def _unload_after(self, name: str) -> None:
        """Unload a model that a client needs no longer; another one may have changed it by now."""
        with contextlib.suppress(RequestError):
            await self.unload(name)
            log.info("model unloaded", model=name, reason="a request had keep_alive: 0")

    @contextlib.asynccontextmanager
    async def lend(self, name: str) -> AsyncIterator[None]:
        """Leave a model to a client that loads it itself, for as long as the context lasts.

        It begins when the turn comes, as for a request. Meanwhile no worker has this model in
        memory, nor any other model where one runs at a time; requests and builds wait. Errors:
        RequestError.
        """
        find_model(self._reconciler.snapshot, name)
        concurrent = self._reconciler.snapshot.manifest.engine.concurrent
        async with self._turn(name):
            self._workers.lent += 1
            try:
                for worker in self._workers.all():
                    if worker.model.name == name or not concurrent:
                        await worker.make_room()
                log.info("model lent", model=name)
                yield
            finally:
                self._workers.lent -= 1
                log.info("model returned", model=name)

    # Requests

    async def run(self, job: Job) -> AsyncGenerator[Progress | Text | End, None]:
        """How the request is read, then the answer, piece by piece, and its end.

        Closing the iterator stops the generation. Errors: RequestError.
        """
        if self._closing:
            raise stopping()
        self._refuse_beyond_the_queue(job)
        self._deadly.refuse(job)
        if job.named is not None:
            self._reconciler.demand.asks_for(job.named)

        ongoing = Ongoing(job=job)
        work = asyncio.create_task(self._work(ongoing))
        self._works[work] = ongoing
        work.add_done_callback(self._works.pop)
        work.add_done_callback(lambda _: ongoing.pieces.put_nowait(None))
        try:
            while (piece := await self._next(ongoing)) is not None:
                if isinstance(piece, Progress):
                    yield piece
                    continue
                yield ongoing.with_waiting(piece)
                ongoing.first_written = ongoing.first_written or time.monotonic()
            if not work.done() or work.cancelled():
                raise stopping()
            end = self.tally.end(ongoing, work.result())
            if job.ends_model:
                self._in_background(self._unload_after(job.model.name))
            yield end
        except errors.RkcachedError as error:
            raise as_request_error(
                error, text_param=job.text_param, schema_param=job.schema_param
            ) from error
        finally:
            if not work.done() and not self._closing:
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError, errors.RkcachedError):
                    await work

    def _refuse_beyond_the_queue(self, job: Job) -> None:
        name = job.model.name
        manifest = self._reconciler.snapshot.manifest
        owners = [
            ongoing.job.owner
            for ongoing in self._works.values()
            if ongoing.job.model.name == name and not ongoing.started
        ]
        if owners and self._gates.free(name, concurrent=manifest.engine.concurrent):
            owners.pop(0)  # it has its turn, but did not take it yet
        refuse_beyond_the_queue(name, owners, job.owner, manifest.serving.queue)

    async def _next(self, ongoing: Ongoing) -> Text | Progress | None:
        """The next piece. Errors: RequestError when the request took too long."""
        limit_s = self._reconciler.snapshot.manifest.serving.request_timeout_s
        if limit_s is None or not ongoing.pieces.empty():
            return await ongoing.pieces.get()

        left_s = ongoing.job.accepted + limit_s - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                return await ongoing.pieces.get()
        except TimeoutError:
            hint = "serving.request_timeout_s in the manifest is the limit"
            raise timed_out(limit_s, hint=hint) from None

    async def _work(self, ongoing: Ongoing) -> RunStats:
        """Run the request until it is answered; retry where the cause is not the request itself."""
        death = ""  # the reason of a worker's death over the prompt cache
        while True:
            job = ongoing.job
            try:
                async with self._turn(
                    job.model.name, job.owner, asks=not self._waits_for_build(job)
                ):
                    worker = self._worker(job.model)
                    found = await self._find(job, worker)
                    ongoing.found = found.without(death) if death else found
                    ongoing.started = ongoing.started or time.monotonic()
                    info = await self._load_model(worker, ongoing)
                    if job.ignores_unsupported:
                        fixed = worker.model.spec.sampling
                        ongoing.job = without_unsupported(job, info, fixed)
                    ongoing.found = ongoing.found.on(rewinds=info.rewinds)
                    done = await self._generate(worker, ongoing)
                    ongoing.found = replace(ongoing.found, rewinds=done.rewinds)
            except errors.WorkerUnavailable as error:
                await self._wait_for(worker, error)
            except (errors.WorkerDied, errors.WorkerTimeout) as error:
                death = await self._blame_file(ongoing, error)
            except errors.ModelReplaced as error:
                await self._look_again(ongoing, error)
            except errors.SchemaMismatch as error:
                if job.correct is None or ongoing.answering:
                    raise
                # Only engines that cannot be held to a schema come here. They get one more try,
                # with the reason in the conversation.
                reason = error.message.partition(":")[0]
                log.info("asked again", model=job.model.name, reason=reason)
                prompt = await job.correct(error.text, error.message)
                ongoing.job = replace(ongoing.job, prompt=prompt, correct=None)
            else:
                self._deadly.answered(job)
                self._note_load(ongoing)
                return done.stats

    def _turn(
        self, model: str, caller: int = NOBODY, *, asks: bool = True
    ) -> AbstractAsyncContextManager[None]:
        """Wait for this model's turn on the engine, and hold it; a build steps aside if it asks."""
        concurrent = self._reconciler.snapshot.manifest.engine.concurrent
        return self._gates.hold(
            model, Priority.LIVE, caller=caller, concurrent=concurrent, asks=asks
        )

    def _waits_for_build(self, job: Job) -> bool:
        """Whether the prompt is being built, and the end of that comes sooner than an answer."""
        progress = self._reconciler.snapshot.building
        if progress is None or progress.key != job.named or job.cold:
            return False
        return sooner_to_wait(progress, time.monotonic())

    async def _find(self, job: Job, worker: Worker) -> Found:
        """The file to load for this request, as things are at this moment."""
        if job.cold:
            return Found()
        found = find(self._reconciler.snapshot.index, job)
        resumed = await self._conversations.find(job, worker.model.identity)
        if resumed is not None and not resumed.has_more_than(found.chosen):
            resumed = None
        return replace(found, resumed=resumed, unready=self._unready(job.named))

    def _unready(self, named: Key | None) -> tuple[str, str] | None:
        """The state of the named prompt and the reason, if its cache cannot be used now."""
        if named is None:
            return None

        snapshot = self._reconciler.snapshot
        progress = snapshot.building
        if progress is not None and progress.key == named:
            return "building", progress.reason

        assessment = snapshot.assessments.get(named)
        if assessment is None or assessment.state is State.FRESH:
            return None
        return assessment.state.value, assessment.reason

    def _worker(self, requested: DesiredModel) -> Worker:
        """The worker of the model as it is declared now."""
        snapshot = self._reconciler.snapshot
        current = snapshot.model(requested.name)
        model = current if isinstance(current, DesiredModel) else requested
        return self._workers.get(worker_model(snapshot.manifest.engine, model))

    async def _load_model(self, worker: Worker, ongoing: Ongoing) -> EngineInfo:
        """Load the model if it is not loaded, and note how long that took.

        Errors: as `Worker.ensure`.
        """
        is_loaded = worker.info is not None
        started = time.monotonic()
        info = await worker.ensure()
        if not is_loaded:
            ongoing.model_load_s += time.monotonic() - started
        return info

    async def _generate(self, worker: Worker, ongoing: Ongoing) -> protocol.Done:
        job = ongoing.job
        operation = protocol.Generate(
            prompt=job.prompt,
            sampling=job.sampling,
            owner=job.state_owner,
            cold=job.cold,
            goes_on=job.goes_on,
        )
        chosen = ongoing.found.chosen
        resumed = ongoing.found.resumed
        if resumed is not None:
            operation = msgspec.structs.replace(
                operation,
                cache=resumed.file,
                common_bytes=resumed.common_bytes,
                is_whole=resumed.is_whole,
            )
        elif chosen is not None:
            operation = msgspec.structs.replace(
                operation,
                cache=cache_file(chosen.artifact),
                common_bytes=chosen.common_bytes,
                is_whole=chosen.is_whole,
                load_bytes=load_bytes(chosen),
            )

        def on_event(event: protocol.FromWorker) -> None:
            match event:
                case protocol.Loading():
                    ongoing.loading = True
                case protocol.Loaded():
                    ongoing.loading = False
                    ongoing.load_ms = event.load_ms
                    ongoing.load_error = event if event.error else None
                case protocol.Failed():
                    ongoing.loading = False  # the worker lives, and may run it again
                case protocol.Progress():
                    ongoing.take_progress(event)
                case protocol.Piece():
                    ongoing.answering = True
                    ongoing.pieces.put_nowait(Text(text=event.text, logprobs=event.logprobs))
                case _:
                    pass

        done = await worker.run(operation, on_event)
        if not isinstance(done, protocol.Done):
            raise TypeError(done)
        return done

    async def _wait_for(self, worker: Worker, error: errors.WorkerUnavailable) -> None:
        """Sit out a short backoff. Errors: `error`, if the backoff is long."""
        wait_s = worker.retry_in_s()
        if not 0 < wait_s <= BACKOFF_PATIENCE_S:
            raise error
        await asyncio.sleep(wait_s)

    async def _look_again(self, ongoing: Ongoing, error: errors.ModelReplaced) -> None:
        """Have the reconciler look at the model again, once for each request.

        Errors: `error`, the second time.
        """
        if ongoing.looked:
            raise error
        ongoing.looked = True
        await self._reconciler.next_look()

    # Files that could not be loaded

    async def _blame_file(self, ongoing: Ongoing, error: errors.WorkerError) -> str:
        """A worker died. The reason to answer without the prompt cache that it was loading.

        Without a saved conversation, the next try takes another file. Errors: `error`, if no file
        was being loaded.
        """
        found = ongoing.found
        if not ongoing.loading:
            if isinstance(error, errors.WorkerDied | errors.GrammarStuck):
                self._deadly.ended_its_worker(ongoing.job, error.message)
            raise error

        # The client has seen nothing yet.
        ongoing.loading = False
        if found.resumed is not None:
            await self._conversations.drop(found.resumed, error.message)
            return ""
        if found.chosen is None:
            raise error
        await self._reconciler.artifact_failed(
            found.chosen.key, found.chosen.artifact, error.message, died=True
        )
        return error.message

    def _note_load(self, ongoing: Ongoing) -> None:
        """Note that the file of a request was used, or have what could not be loaded healed."""
        found = ongoing.found
        failure = ongoing.load_error
        healing: Coroutine[None, None, None]
        if failure is None:
            if found.resumed is not None:
                self._conversations.used(found.resumed)
            return

        if found.resumed is not None:
            healing = self._conversations.drop(found.resumed, failure.error)
        elif failure.replaced or found.chosen is None:
            self._reconciler.look_again(now=True)
            return
        else:
            healing = self._reconciler.artifact_failed(
                found.chosen.key, found.chosen.artifact, failure.error, died=False
            )

        self._in_background(healing)

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _uninterrupted(work: Coroutine[Any, Any, protocol.Result]) -> protocol.Result:
    """Have it end before the caller may be cancelled: nothing aborts it but the worker's end."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
