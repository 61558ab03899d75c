"""Keeps one worker process for each model that is in use.

A worker is a state machine, driven only from the event loop:

    STOPPED --ensure--> STARTING --Ready--> READY --operation--> BUSY --answer--> READY
       ^                    |                 |                     |
       |                    +----- death -----+------- death -------+---> BACKOFF
       +---- stop / idle / model replaced (from READY) ----+              (then as STOPPED)

A death is classified once: by signal, exit code, deadline or protocol violation. It fails the
running operation and puts the worker into backoff, whose delay doubles up to a limit and is
forgotten after a success.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from rkcached.engines.base import EngineInfo
from rkcached.errors import (
    Aborted,
    EngineError,
    GrammarStuck,
    ModelLoadError,
    ModelReplaced,
    WorkerDied,
    WorkerError,
    WorkerTimeout,
    WorkerUnavailable,
)
from rkcached.host.logs import log
from rkcached.worker import memory, protocol
from rkcached.worker.expected import Expected
from rkcached.worker.model import Backoff, Deadlines, Keeper, WorkerModel
from rkcached.worker.opened import OpenedFolders, StoreReach
from rkcached.worker.process import WorkerProcess, describe

# They take no conversation's place in memory.
_STATELESS = protocol.Embed | protocol.Rank | protocol.Keep | protocol.Tokenize

KEEP_S = 1.0
"""A worker that ends has so long to save the conversation in its memory."""


class WorkerState(StrEnum):
    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    BACKOFF = "backoff"


AdmitWorker = Callable[["Worker"], Awaitable[None]]
"""Waits until there is room for one more loaded model."""


async def _admit_all(_: Worker) -> None:
    pass


class Worker:
    """The worker of one model. Operations run one at a time; the caller holds the gate."""

    def __init__(
        self,
        model: WorkerModel,
        *,
        deadlines: Deadlines,
        backoff: Backoff,
        on_state: Callable[[Worker], None] = lambda _: None,
        admit: AdmitWorker = _admit_all,
        keeper: Keeper | None = None,
        reach: StoreReach | None = None,
    ) -> None:
        self.model = model
        self._opened = OpenedFolders(reach)
        # Why the kernel does not confine it, as it was logged.
        self._unconfined = ""
        self._keeper = keeper
        self._admit = admit
        self.admitted = False
        """It may hold a model in memory: from the admission until its process is gone."""
        self.made_room = False
        """It was stopped for another model, and not started since."""
        self.load_ms: float | None = None
        """How long loading took the last time, from the start of the process."""
        self.just_loaded = False
        """Only while `on_state` hears of it."""
        self._on_state = on_state
        self._state = WorkerState.STOPPED
        self.since = time.monotonic()
        """When it came into its state; monotonic seconds."""
        self.heard = self.since
        """When it last sent something or changed its state; monotonic seconds."""
        self.info: EngineInfo | None = None
        self.restarts = 0
        self.last_failure = ""
        self._deadlines = deadlines
        self._backoff = backoff
        self._failures = 0
        self._retry_at = 0.0
        self._process = WorkerProcess(model.name, stop_s=deadlines.stop_s)
        self._running_id = 0  # of the operation that runs; 0 for none
        self._idle_timer: asyncio.TimerHandle | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def state(self) -> WorkerState:
        return self._state

    @state.setter
    def state(self, state: WorkerState) -> None:
        if state is not self._state:
            self._state = state
            self.since = self.heard = time.monotonic()
            self._on_state(self)

    @property
    def pid(self) -> int | None:
        handle = self._process.handle
        return handle.pid if handle is not None else None

    def retry_in_s(self) -> float:
        """How long the backoff still lasts; 0 when the worker may be started."""
        if self.state is not WorkerState.BACKOFF:
            return 0.0
        return max(0.0, self._retry_at - asyncio.get_running_loop().time())

    @property
    def patience_s(self) -> float:
        """Seconds of silence that end the worker."""
        return self.model.timeout_s or max(self._deadlines.start_s, self._deadlines.silence_s)

    # Life

    async def ensure(self) -> EngineInfo:
        """Start the process if it does not run.

        Errors: ModelLoadError, EngineError, WorkerError (ModelReplaced).
        """
        if self._stopping is not None:
            await asyncio.shield(self._stopping)

        if self._process.handle is not None and self.info is not None:
            if not (reason := self._lost_folder()):
                return self.info
            await self._replace(reason)

        if (wait_s := self.retry_in_s()) > 0:
            raise WorkerUnavailable(
                f"the worker of {self.model.name} is backing off after {self._failures} "
                f"consecutive failures: {self.last_failure}",
                hint=f"it is started again in {wait_s:.1f} s",
            )
        return await self._start()

    def _lost_folder(self) -> str:
        """Why the process cannot use its folders any more; empty if it can."""
        if self._process.lost_scratch():
            return f"its scratch folder was deleted: {self._process.scratch_dir}"
        if path := self._opened.lost():
            return f"a folder of the store was created or replaced after the worker started: {path}"
        return ""

    async def _replace(self, reason: str) -> None:
        """End a process that lost its folders.

        This is no failure: the next process may start at once.
        """
        self.restarts += 1
        self.last_failure = reason
        log.warning("worker restarted", model=self.model.name, reason=self.last_failure)
        await self.stop()

    async def _start(self) -> EngineInfo:
        self.state = WorkerState.STARTING
        model = self.model
        limit_bytes = model.max_memory_bytes or memory.default_limit(
            Path(model.spec.path), model.spec.context_tokens
        )

        try:
            await self._admit(self)
            self.made_room = False
            started = time.monotonic()
            process = await self._process.start()
            await self._refuse_stopped()
            reach = await asyncio.to_thread(
                self._opened.reach_now, model, self._process.scratch_dir
            )
            message = protocol.Start(
                implementation=model.implementation,
                spec=msgspec.structs.replace(model.spec, scratch_dir=self._process.scratch_dir),
                max_memory_bytes=limit_bytes,
                confine=model.confine,
                reach=reach,
            )
            self._process.send(message)
            answer = await self._receive(model.timeout_s or self._deadlines.start_s)
        except OSError as error:
            await self._end(kill=True)
            self.state = WorkerState.STOPPED
            raise WorkerUnavailable(
                f"the worker of {self.model.name} cannot be started: {error}"
            ) from error
        except WorkerError:
            raise  # it died, and was cleaned up
        except BaseException:  # cancelled, or a defect of ours: either way no process may stay
            await _to_the_end(self._end())
            self.state = WorkerState.STOPPED
            raise

        match answer:
            case protocol.Ready():
                await self._refuse_replaced_files()
                self.load_ms = (time.monotonic() - started) * 1000
                self._take_ready(answer, process)
                return answer.info
            case protocol.Failed():
                await self._end()
                refusal = self._explain_refusal(answer)
                self._back_off(refusal.message)
                raise refusal
            case _:
                raise await self._broken(f"answered start with {type(answer).__name__}")

    async def _refuse_stopped(self) -> None:
        """End the process if somebody stopped the worker while it was started.

        Errors: WorkerUnavailable.
        """
        if self.state is not WorkerState.STARTING:
            await self._end(kill=True)
            raise self._stopped()

    async def _refuse_replaced_files(self) -> None:
        """End the process if it may have loaded other files than those of its model.

        Errors: ModelReplaced.
        """
        replaced = self.model.replaced_file()
        if not replaced:
            return

        await self._end()
        self.state = WorkerState.STOPPED
        raise ModelReplaced(
            f"{replaced} changed while {self.model.name} was loaded, or since it was looked at",
            hint="it is looked at again; try again",
        )

    def _take_ready(self, answer: protocol.Ready, process: asyncio.subprocess.Process) -> None:
        self._process.settle()
        self.info = answer.info
        self.just_loaded = True
        self.state = WorkerState.READY
        self.just_loaded = False
        self._watcher = asyncio.create_task(self._watch(process))
        load_ms = round(answer.load_ms)
        log.info("model loaded", model=self.model.name, load_ms=load_ms, pid=self.pid)
        if answer.unconfined and answer.unconfined != self._unconfined:
            self._unconfined = answer.unconfined
            log.warning("worker not confined", model=self.model.name, why=answer.unconfined)

    def _explain_refusal(self, answer: protocol.Failed) -> EngineError:
        """The error of a failed load, with the reason that the library printed."""
        refusal = self._process.lines.explain(protocol.engine_error(answer))
        lines = (refusal.message, *self._process.lines.recent)
        if want := memory.refused(lines, self.model.max_memory_bytes):
            return ModelLoadError(
                f"{self.model.name} cannot be loaded: {want}",
                hint="the log has the lines of the library",
            )
        if self.model.confine and any(map(_was_forbidden, lines)):
            return ModelLoadError(
                refusal.message,
                hint="workers are confined; if the library needs more files or devices, set "
                "`engine: {confine: false}` in the manifest",
            )
        return refusal

    async def stop(self) -> None:
        """End the process: it leaves when its socket closes, or is killed. Idempotent."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def make_room(self) -> None:
        """Stop, because the memory is needed for another model."""
        self.made_room = self.made_room or self.info is not None
        await self.stop()

    async def _stop(self) -> None:
        try:
            await self._keep_conversations()
            code = await self._end()
            self.state = WorkerState.STOPPED
            if code:
                self.last_failure = f"{describe(code)} while it was stopped"
                log.warning("worker ended badly", model=self.model.name, how=self.last_failure)
        finally:
            self._stopping = None

    async def _keep_conversations(self) -> None:
        """Have the conversations in memory saved, if the worker is idle and that takes no time."""
        if self._keeper is None or self.info is None or self.state is not WorkerState.READY:
            return
        with contextlib.suppress(EngineError, WorkerError, TimeoutError):
            for age in range(self.info.states):
                places = self._keeper.places(self.model, 1)
                if not places:
                    return
                async with asyncio.timeout(KEEP_S):
                    await self._exchange(protocol.Keep(keep_at=places, age=age), None)

    # Operations

    async def run(
        self,
        operation: protocol.Operation,
        on_event: Callable[[protocol.FromWorker], None] | None = None,
    ) -> protocol.Result:
        """Start the worker if needed, run one operation and return its answer.

        `on_event` gets the events before the answer, and `Failed`. When the caller is cancelled,
        the operation is aborted and waited for. If the engine fails because somebody deleted its
        scratch folder, and no piece of an answer is out, a new process runs the operation again.
        Errors: EngineError from the engine; WorkerDied, WorkerTimeout, WorkerUnavailable.
        """
        answering = False

        def note(event: protocol.FromWorker) -> None:
            nonlocal answering
            answering = answering or isinstance(event, protocol.Piece)
            if on_event is not None:
                on_event(event)

        if self._keeper is not None and not isinstance(operation, _STATELESS):
            count = self.info.states if self.info is not None else 1
            places = self._keeper.places(self.model, count)
            operation = msgspec.structs.replace(operation, keep_at=places)
        try:
            return await self._run_once(operation, note)
        except Aborted:
            raise
        except EngineError:
            if answering or not self._process.lost_scratch():
                raise
        return await self._run_once(operation, on_event)

    async def _run_once(
        self,
        operation: protocol.Operation,
        on_event: Callable[[protocol.FromWorker], None] | None,
    ) -> protocol.Result:
        await self.ensure()
        self._cancel_idle_timer()
        self._process.lines.forget()

        self._running_id = operation.id
        self.state = WorkerState.BUSY
        running = asyncio.create_task(self._exchange(operation, on_event))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await _to_the_end(self._abandon(operation, running))
            raise
        finally:
            self._running_id = 0
            if self.state is WorkerState.BUSY:
                self.state = WorkerState.READY
                self._arm_idle_timer()

    async def abort(self, operation: protocol.Operation) -> None:
        """Ask for an early end of this operation, if it runs. It still gets its answer."""
        if operation.id != self._running_id:
            return
        with contextlib.suppress(WorkerError):
            self._process.send(protocol.Abort(id=operation.id))

    async def _exchange(
        self, operation: protocol.Operation, on_event: Callable[[protocol.FromWorker], None] | None
    ) -> protocol.Result:
        self._process.send(operation)
        event: protocol.FromWorker | None = None
        expected = Expected(operation)
        while True:
            event = await self._next_event(operation, event)
            if wrong := expected.not_by(event):
                raise await self._broken(wrong)

            if isinstance(event, protocol.Result):
                self._failures = 0
                if isinstance(event, protocol.Done):
                    self._learn(event)
                return event

            match event:
                case protocol.Saved():
                    if self._keeper is not None:
                        self._keeper.take(self.model, event)
                case protocol.Failed():
                    self._failures = 0  # the engine refused; the worker is well
                    if on_event is not None:
                        on_event(event)
                    await self._process.lines.catch_up()
                    raise self._process.lines.explain(
                        protocol.engine_error(event, self.model.trained_tokens)
                    )
                case _:
                    if on_event is not None:
                        on_event(event)

    def _learn(self, done: protocol.Done) -> None:
        """Note that a run has shown what no library states."""
        if self.info is not None and self.info.rewinds and not done.rewinds:
            self.info = msgspec.structs.replace(self.info, rewinds=False)
            log.info("state cannot be taken back", model=self.model.name)

    async def _abandon(
        self, operation: protocol.Operation, running: asyncio.Task[protocol.Result]
    ) -> None:
        """Abort an operation whose caller is gone; kill the process if it does not end in time."""
        await self.abort(operation)
        done, _ = await asyncio.wait({running}, timeout=self._deadlines.stop_s)
        if not done:
            running.cancel()
            reason = "an aborted operation did not end"
            log.warning("worker stopped", model=self.model.name, reason=reason)
            await self._end()
            self.state = WorkerState.STOPPED

        with contextlib.suppress(asyncio.CancelledError, EngineError, WorkerError):
            await running

    async def _receive(self, timeout_s: float) -> protocol.FromWorker:
        """The next event. Errors: WorkerDied, WorkerTimeout; the worker is then in backoff."""
        try:
            event = await self._process.receive(timeout_s)
        except TimeoutError:
            silence = f"sent nothing for {timeout_s:.0f} s"
            raise await self._died(silence, WorkerTimeout, kill=True) from None
        except EOFError:
            raise await self._died("") from None
        except protocol.ProtocolError as error:
            raise await self._broken(str(error)) from error

        self.heard = time.monotonic()
        return event

    async def _next_event(
        self, operation: protocol.Operation, last: protocol.FromWorker | None
    ) -> protocol.FromWorker:
        """As `_receive`; after the prefill of a request that has a JSON schema, with less patience.

        A library that finds no token may look for one without end. Errors: GrammarStuck, too.
        """
        silence_s = self.model.timeout_s or self._deadlines.silence_s
        if not (
            isinstance(last, protocol.Progress) and last.is_last and self._is_held_to(operation)
        ):
            return await self._receive(silence_s)

        timeout_s = min(silence_s, self._deadlines.grammar_s)
        try:
            return await self._receive(timeout_s)
        except WorkerTimeout as error:
            raise GrammarStuck(
                f"the model found no token that fits this schema within {timeout_s:g} s",
                hint="make the schema simpler, above all its patterns",
            ) from error

    def _is_held_to(self, operation: protocol.Operation) -> bool:
        """Whether the engine keeps the answer to a JSON schema, token by token."""
        return (
            isinstance(operation, protocol.Generate)
            and bool(operation.sampling.json_schema)
            and self.info is not None
            and self.info.constrains_json
        )

    # Death

    async def _broken(self, what: str) -> WorkerError:
        """Kill a worker that broke the protocol. Returns the error to raise."""
        return await self._died(f"broke the protocol: {what}", kill=True)

    async def _died(
        self, what: str, error_type: type[WorkerError] = WorkerDied, *, kill: bool = False
    ) -> WorkerError:
        """Classify the death, clean up, and enter backoff. Returns the error to raise."""
        if self._process.handle is None:  # stopped on purpose while somebody waited for it
            return self._stopped()

        code = await self._end(kill=kill)
        how = what if kill else f"{describe(code)} {what}".rstrip()
        lines = self._process.lines
        want = memory.refused(lines.recent, self.model.max_memory_bytes)
        if want := want or memory.killed(code, self._process.kernel_kills):
            how = f"{how}: {want}"

        self.restarts += 1
        self._back_off(how)
        retry_in_s = round(self.retry_in_s(), 2)
        log.error("worker died", model=self.model.name, how=how, retry_in_s=retry_in_s)

        last = f"; its last line: {lines.last}" if lines.last else ""
        return error_type(
            f"the worker of {self.model.name} {how}{last}", hint="it is restarted; try again"
        )

    def _stopped(self) -> WorkerUnavailable:
        return WorkerUnavailable(f"the worker of {self.model.name} was stopped", hint="try again")

    def _back_off(self, why: str) -> None:
        self._failures += 1
        self.last_failure = why
        self._retry_at = asyncio.get_running_loop().time() + self._backoff.delay(self._failures)
        self.state = WorkerState.BACKOFF

    async def _end(self, *, kill: bool = False) -> int:
        """End the process, and clean up after it; returns its exit code."""
        self._cancel_idle_timer()
        self.info = None
        code = await self._process.end(kill=kill)
        self.admitted = False
        await self._process.clean_up()
        return code

    # Idle

    def _arm_idle_timer(self) -> None:
        if self.model.idle_unload_s is not None:
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_later(self.model.idle_unload_s, self._unload)

    def _cancel_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _unload(self) -> None:
        if self.state is WorkerState.READY and self._stopping is None:
            log.info(
                "model unloaded",
                model=self.model.name,
                reason=f"idle for {self.model.idle_unload_s:g} s",
            )
            self._stopping = asyncio.create_task(self._stop())

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Notice a worker that dies between two operations."""
        await process.wait()
        if self._process.handle is not process or self._stopping is not None:
            return
        if self.state is WorkerState.READY:
            self._stopping = asyncio.create_task(self._bury())

    async def _bury(self) -> None:
        try:
            await self._died("while idle")
        finally:
            self._stopping = None


async def _to_the_end(work: Coroutine[Any, Any, object]) -> None:
    """Finish a cancelled caller's cleanup, even if the caller is cancelled again."""
    task: asyncio.Task[Any] = asyncio.create_task(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)


def _was_forbidden(line: str) -> bool:
    return "ermission denied" in line or "not permitted" in line
