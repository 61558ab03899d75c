"""Answers requests: choose the prompt, render, pick the prompt cache, run, measure.

A request never waits for a rebuild. If the wanted prompt cache is stale or missing, or fails to
load, the answer is computed without one, from the prompt's current text. What the engine measured
decides whether it was a hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace

import structlog

from rkcached import errors
from rkcached.api.prepare import Job, Preparation, as_request_error
from rkcached.api.responses import NOT_MEASURED, CacheReport, PromptTokensDetails, Usage
from rkcached.engines.base import FinishReason, RunStats, TokenLogprob
from rkcached.errors import RequestError
from rkcached.plan.desired import DesiredModel
from rkcached.plan.planner import State
from rkcached.plan.worker_model import worker_model
from rkcached.reconcile.events import Events
from rkcached.reconcile.loop import Reconciler
from rkcached.sources.records import Key
from rkcached.store.sidecar import StoredArtifact
from rkcached.worker import protocol
from rkcached.worker.gate import Gates, Priority
from rkcached.worker.operations import BOUNDARY_TOKENS
from rkcached.worker.pool import Workers
from rkcached.worker.supervisor import Worker

log = structlog.get_logger()

BACKOFF_PATIENCE_S = 2.0
"""A request waits this long for a worker that rests after a failure, before it is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    finish: FinishReason
    usage: Usage
    report: CacheReport


@dataclass(slots=True, kw_only=True)
class PromptUse:
    """How requests used a prompt since the daemon started."""

    hits: int = 0
    misses: int = 0
    last_used: float = 0.0
    """Unix seconds."""


@dataclass(slots=True, kw_only=True)
class _Run:
    """What is known of a run while it goes on."""

    job: Job
    chosen: tuple[Key, StoredArtifact] | None = None
    unchosen: tuple[str, str] = ("cold", "")
    """State and reason to report if no prompt cache was chosen."""
    started: float = 0.0
    load_ms: float = 0.0
    load_error: protocol.Loaded | None = None
    loading: bool = False
    """The worker is loading the prompt cache: only a death now is the cache's fault."""
    looked: bool = False
    """Its model had changed, and was looked at again."""
    answering: bool = False
    """The client may have seen a piece."""
    first_written: float = 0.0
    """When the first piece had been taken, which for a stream means: sent."""
    events: asyncio.Queue[Text | None] = field(default_factory=asyncio.Queue)
    """Pieces of the answer; None when the work has ended."""


class Serving:
    def __init__(
        self, reconciler: Reconciler, workers: Workers, gates: Gates, events: Events
    ) -> None:
        self._events = events
        self._reconciler = reconciler
        self.preparation = Preparation(lambda: reconciler.snapshot)
        self._workers = workers
        self._gates = gates
        self.answers: Counter[str] = Counter()
        """Answers by state of the cache, since the start."""
        self.uses: dict[Key, PromptUse] = {}
        self._works: dict[asyncio.Task[RunStats], _Run] = {}
        self._closing = False
        self._background: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> int:
        """Requests that are being answered or wait for their turn."""
        return len(self._works)

    async def close(self, grace_s: float) -> None:
        """Refuse new requests, give running answers this many seconds to end, then tell their clients."""
        self._closing = True
        self.preparation.close()
        log.debug("new requests are refused", running=len(self._works))
        if self._works:
            await asyncio.wait(self._works, timeout=grace_s)
        for work, run in self._works.items():
            work.cancel()
            run.events.put_nowait(
                None
            )  # tell its client now: a library that hangs would let it wait

    async def load(self, name: str) -> None:
        """Load a model now. Errors: RequestError."""
        model = self.preparation.model(name)
        engine = self._reconciler.snapshot.manifest.engine
        try:
            async with self._gates.hold(name, Priority.LIVE, concurrent=engine.concurrent):
                await self._workers.get(worker_model(engine, model)).ensure()
        except errors.RkcachedError as error:
            raise as_request_error(error) from error

    async def unload(self, name: str) -> None:
        """Unload a model, after what it is doing.

        It is loaded again when it is needed. Errors: RequestError.
        """
        self.preparation.model(name)
        concurrent = self._reconciler.snapshot.manifest.engine.concurrent
        async with self._gates.hold(name, Priority.LIVE, concurrent=concurrent):
            for worker in self._workers.all():
                if worker.model.name == name:
                    await worker.stop()

    @contextlib.asynccontextmanager
    async def lend(self, name: str) -> AsyncIterator[None]:
        """Leave a model to somebody who loads it himself: as for a request, its turn is waited for and kept.

        Meanwhile nothing of ours has it in memory, nor, where one model runs at a time, any other; requests and builds
        wait. Errors: RequestError.
        """
        self.preparation.model(name)
        concurrent = self._reconciler.snapshot.manifest.engine.concurrent
        async with self._gates.hold(name, Priority.LIVE, concurrent=concurrent):
            self._workers.lent += 1
            try:
                for worker in self._workers.all():
                    if worker.model.name == name or not concurrent:
                        await worker.stop()
                log.info("model lent", model=name)
                yield
            finally:
                self._workers.lent -= 1
                log.info("model returned", model=name)

    async def run(self, job: Job) -> AsyncGenerator[Text | End, None]:
        """The answer, piece by piece, and its end.

        Closing the iterator stops the generation. Errors: RequestError.
        """
        if self._closing:
            raise _stopping()
        self._refuse_beyond_the_queue(job.model)
        run = _Run(job=job)
        work = asyncio.create_task(self._work(run))
        self._works[work] = run
        work.add_done_callback(self._works.pop)
        work.add_done_callback(lambda _: run.events.put_nowait(None))
        try:
            while (text := await self._next(run)) is not None:
                yield _with_waiting(text, run.events)
                run.first_written = run.first_written or time.monotonic()
            if not work.done() or work.cancelled():
                raise _stopping()
            yield self._end(run, work.result())
        except errors.RkcachedError as error:
            raise as_request_error(error, text=job.text, binds=job.binds) from error
        finally:
            if not work.done() and not self._closing:
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError, errors.RkcachedError):
                    await work

    def waiting(self, model: str) -> int:
        """Requests that wait for their turn."""
        return sum(
            1 for run in self._works.values() if run.job.model.name == model and not run.started
        )

    def _refuse_beyond_the_queue(self, model: DesiredModel) -> None:
        manifest = self._reconciler.snapshot.manifest
        limit, waiting = manifest.serving.queue, self.waiting(model.name)
        if waiting and self._gates.free(model.name, concurrent=manifest.engine.concurrent):
            waiting -= 1  # it has its turn, but did not take it yet
        if waiting >= limit:
            raise RequestError(
                503,
                f"{waiting} requests wait for the model {model.name!r} already",
                code="queue_full",
                hint="try again in a moment; serving.queue in the manifest is the limit",
                retry_after_s=1,
            )

    async def _next(self, run: _Run) -> Text | None:
        """The next piece. Errors: RequestError when the request took too long."""
        limit_s = self._reconciler.snapshot.manifest.serving.request_timeout_s
        if limit_s is None or not run.events.empty():
            return await run.events.get()
        left_s = run.job.accepted + limit_s - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                return await run.events.get()
        except TimeoutError:
            raise RequestError(
                504,
                f"the request was not answered within {limit_s:g} s",
                code="request_timeout",
                hint="serving.request_timeout_s in the manifest is the limit",
            ) from None

    def _choose(self, job: Job) -> tuple[Key, StoredArtifact] | None:
        """The prompt cache to load: exactly a prefix of this request, and fresh at this moment."""
        if job.cold:
            return None
        index = self._reconciler.snapshot.index
        key = index.longest(job.model.name, job.prompt.encode())
        artifact = index.get(key) if key is not None else None
        return (key, artifact) if key is not None and artifact is not None else None

    async def _work(self, run: _Run) -> RunStats:
        died = ""
        while True:
            try:
                concurrent = self._reconciler.snapshot.manifest.engine.concurrent
                async with self._gates.hold(
                    run.job.model.name, Priority.LIVE, concurrent=concurrent
                ):
                    run.chosen = None if died else self._choose(run.job)
                    run.unchosen = ("miss", died) if died else self._why_not(run.job)
                    run.started = run.started or time.monotonic()
                    model = self._reconciler.snapshot.model(run.job.model.name)
                    current = model if isinstance(model, DesiredModel) else run.job.model
                    worker = self._workers.get(
                        worker_model(self._reconciler.snapshot.manifest.engine, current)
                    )
                    done = await self._generate(worker, run)
            except errors.WorkerUnavailable as error:
                await self._wait_for(worker, error)
            except (errors.WorkerDied, errors.WorkerTimeout) as error:
                if run.chosen is None or not run.loading:
                    raise
                # It died over the prompt cache, and the client has seen nothing yet: answer
                # without.
                run.loading = False
                await self._reconciler.artifact_failed(*run.chosen, error.message, died=True)
                died = error.message
            except errors.ModelReplaced as error:
                await self._look_again(run, error)
            except errors.SchemaMismatch as error:
                if run.job.correct is None or run.answering:
                    raise
                # Only engines that cannot be held to a schema come here. They get one more chance,
                # and are told why.
                log.info(
                    "asked again", model=run.job.model.name, reason=error.message.partition(":")[0]
                )
                prompt = await run.job.correct(error.text, error.message)
                run.job = replace(run.job, prompt=prompt, correct=None)
            else:
                if run.load_error is not None and run.chosen is not None:
                    self._report_load_error(run.chosen, run.load_error)
                return done.stats

    async def _generate(self, worker: Worker, run: _Run) -> protocol.Done:
        cache = None
        if run.chosen is not None:
            artifact = run.chosen[1]
            if artifact.signature is not None:
                cache = protocol.CacheFile(
                    path=str(artifact.path),
                    signature=artifact.signature,
                    fingerprint=artifact.sidecar.fingerprint,
                )

        def make(operation_id: int) -> protocol.Generate:
            run.loading = False  # it may be the second try
            return protocol.Generate(
                id=operation_id,
                prompt=run.job.prompt,
                sampling=run.job.sampling,
                cache=cache,
                cold=run.job.cold,
            )

        def on_event(event: protocol.FromWorker) -> None:
            match event:
                case protocol.Loading():
                    run.loading = True
                case protocol.Loaded():
                    run.loading = False
                    run.load_ms = event.load_ms
                    run.load_error = event if event.error else None
                case protocol.Piece():
                    run.answering = True
                    run.events.put_nowait(Text(text=event.text, logprobs=event.logprobs))
                case _:
                    pass

        done = await worker.run(make, on_event)
        if not isinstance(done, protocol.Done):
            raise TypeError(done)
        return done

    async def _wait_for(self, worker: Worker, error: errors.WorkerUnavailable) -> None:
        """Sit out a short backoff. Errors: the given one, if it is long."""
        wait_s = worker.retry_in_s()
        if not 0 < wait_s <= BACKOFF_PATIENCE_S:
            raise error
        await asyncio.sleep(wait_s)

    async def _look_again(self, run: _Run, error: errors.ModelReplaced) -> None:
        """Have the model looked at anew, once for each request.

        Errors: the given one, the second time.
        """
        if run.looked:
            raise error
        run.looked = True
        await self._reconciler.next_look()

    def _report_load_error(
        self, chosen: tuple[Key, StoredArtifact], event: protocol.Loaded
    ) -> None:
        if event.replaced:
            self._reconciler.look_again(now=True)
            return
        task = asyncio.create_task(
            self._reconciler.artifact_failed(*chosen, event.error, died=False)
        )
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _end(self, run: _Run, stats: RunStats) -> End:
        job, now = run.job, time.monotonic()
        state, reason = self._outcome(run, stats.cached_tokens)
        loaded = run.chosen if run.load_error is None else None
        key = loaded[0] if loaded is not None else None
        self.answers[state] += 1
        if loaded is not None:
            key, artifact = loaded
            use = self.uses.setdefault(key, PromptUse())
            use.last_used = time.time()
            if state in ("hit", "loaded"):
                use.hits += 1
                self._reconciler.artifact_served(artifact)
            else:
                use.misses += 1
                log.warning(
                    "cache did not help",
                    model=key.model,
                    prompt=key.prompt,
                    cached_tokens=stats.cached_tokens,
                )
        report = CacheReport(
            cache=key.prompt if key is not None else None,
            state=state,
            reason=reason,
            cached_tokens=stats.cached_tokens,
            ttft_ms=_ms((run.first_written or now) - job.accepted),
            queue_ms=_ms(run.started - job.accepted),
            load_ms=round(run.load_ms, 2),
            prefill_ms=round(stats.prefill_ms, 2),
            decode_tokens_per_s=round(stats.decode_tokens / stats.decode_ms * 1000, 1)
            if stats.decode_ms >= 1
            else 0.0,
        )
        self._events.publish(
            "answer",
            model=job.model.name,
            prompt=report.cache,
            state=state,
            ttft_ms=report.ttft_ms,
            queue_ms=report.queue_ms,
            cached_tokens=stats.cached_tokens,
            prefill_tokens=stats.prefill_tokens,
        )
        usage = Usage(
            prompt_tokens=stats.prompt_tokens,
            completion_tokens=stats.decode_tokens,
            total_tokens=stats.prompt_tokens + stats.decode_tokens,
            prompt_tokens_details=_details(stats.cached_tokens),
        )
        return End(finish=stats.finish, usage=usage, report=report)

    def _outcome(self, run: _Run, cached_tokens: int | None) -> tuple[str, str]:
        """The state that the answer reports, and why no cache was used if one was wanted."""
        if run.load_error is not None:
            return "miss", run.load_error.error
        if run.chosen is not None and cached_tokens is None:
            return "loaded", NOT_MEASURED
        if run.chosen is not None:
            needed = run.chosen[1].sidecar.tokens - BOUNDARY_TOKENS
            return (
                ("hit", "")
                if (cached_tokens or 0) >= needed
                else ("miss", "the prompt cache was loaded but not reused")
            )
        return run.unchosen

    def _why_not(self, job: Job) -> tuple[str, str]:
        """State of the prompt that was asked for by name, if its cache cannot be used now, and the reason."""
        if job.named is not None and not job.cold:
            progress = self._reconciler.snapshot.building
            if progress is not None and progress.key == job.named:
                return "building", progress.reason
            assessment = self._reconciler.snapshot.assessments.get(job.named)
            if assessment is not None and assessment.state is not State.FRESH:
                return assessment.state.value, assessment.reason
            if assessment is not None and job.with_tools:
                return "cold", "the tools stand inside the prompt's text"
        return "cold", ""


def _with_waiting(text: Text, events: asyncio.Queue[Text | None]) -> Text:
    """A piece, and those that came while the one before it was written: one write for all of them."""
    if events.empty():
        return text
    pieces = [text]
    while not events.empty():
        piece = events.get_nowait()
        if piece is None:
            events.put_nowait(None)
            break
        pieces.append(piece)
    logprobs = tuple(token for piece in pieces for token in piece.logprobs)
    return Text(text="".join(piece.text for piece in pieces), logprobs=logprobs)


def _details(cached_tokens: int | None) -> PromptTokensDetails | None:
    return None if cached_tokens is None else PromptTokensDetails(cached_tokens=cached_tokens)


def _stopping() -> RequestError:
    return RequestError(
        503, "the daemon is stopping", code="shutting_down", hint="try again", retry_after_s=2
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)
