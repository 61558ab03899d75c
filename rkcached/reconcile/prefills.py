"""Has a worker prefill a prompt, save its state and prove it.

It goes on from what there is: from what the build had read when it stepped aside, or else from a
prompt cache that begins alike (`bases`). If that fails, the prompt is read as a whole. The gate is
held only while the engine works.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rkcached.errors import (
    Aborted,
    ArtifactLoadError,
    EngineError,
    ModelLoadError,
    NoRoom,
    RkcachedError,
    VerifyFailed,
    WorkerDied,
    WorkerTimeout,
)
from rkcached.host import disk
from rkcached.host.logs import log
from rkcached.plan.desired import DesiredModel
from rkcached.plan.fingerprint import owner_in
from rkcached.plan.worker_model import worker_model
from rkcached.reconcile.bases import Bases, Partials
from rkcached.reconcile.build_queue import REQUESTED
from rkcached.reconcile.build_request import BuildRequest
from rkcached.store.staging import Staging
from rkcached.worker import protocol
from rkcached.worker.building import BOUNDARY_TOKENS
from rkcached.worker.gate import Gates, Priority
from rkcached.worker.pool import Workers
from rkcached.worker.supervisor import Worker

PATIENCE_S = 2.0
"""A build that somebody waits for, or whose base failed, sits out a worker's rest of this length;
others are planned again."""

FULL_BYTES = 1 << 16
"""Less is left free on a disk that was filled up: the last piece did not fit."""

OnProgress = Callable[[int, int], None]
"""Receives (tokens prefilled, tokens in total)."""


@dataclass(slots=True, kw_only=True)
class BuildCosts:
    """The costs of a model's builds beside the prefill, as last measured. None: not yet."""

    proof_s: float | None = None
    aside_s: float | None = None
    """From the wish of a request until the engine was free."""
    keeps_state: bool = False
    """A run goes on from what an interrupted one has read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Texts:
    prefix: str
    # A whole request that starts with the prefix.
    probe: str


class Prefills:
    def __init__(self, staging: Staging, workers: Workers, gates: Gates) -> None:
        self.partials = Partials(staging)
        self._staging = staging
        self._workers = workers
        self._gates = gates
        self._bases = Bases()
        # By identity of the model.
        self._costs: dict[str, BuildCosts] = {}

    def costs(self, model: DesiredModel) -> BuildCosts:
        return self._costs.setdefault(model.identity, BuildCosts())

    async def run(
        self,
        request: BuildRequest,
        prefix: str,
        probe: str,
        staged: Path,
        on_progress: OnProgress,
    ) -> protocol.Built:
        """Write a proven prompt cache to `staged`.

        Errors: Aborted when it stepped aside for a live request, then what it has read is kept for
        the next attempt; EngineError, WorkerError, NoRoom.
        """
        texts = _Texts(prefix=prefix, probe=probe)
        goes_on = False
        try:
            built = await self._from_base(request, texts, staged, on_progress)
            if built is None:
                built = await self._prefill(request, texts, staged, on_progress, None)
        except Aborted:
            goes_on = True
            raise
        finally:
            if not goes_on:
                self.partials.drop()

        self.costs(request.model).proof_s = built.proof_ms / 1000
        return built

    async def check(
        self, request: BuildRequest, prefix: str, probe: str, staged: Path, expected: str | None
    ) -> protocol.Checked:
        """Prove the prompt cache in `staged`, which another installation built.

        `expected` as for `protocol.Check`. Errors: EngineError, among them VerifyFailed;
        WorkerError.
        """
        signature = await asyncio.to_thread(self._staging.signature, staged)
        operation = protocol.Check(
            cache=protocol.CacheFile(
                path=str(staged),
                signature=signature,
                fingerprint=request.action.fingerprint.digest,
            ),
            probe=probe,
            expected=expected,
        )
        async with self._gates.hold(
            request.model.name, Priority.LIVE, concurrent=request.engine.concurrent
        ):
            worker = await self._loaded(request)
            known = await worker.run(protocol.Tokenize(text=prefix))
            checked = await worker.run(operation)
        if not isinstance(known, protocol.Tokenized) or not isinstance(checked, protocol.Checked):
            raise TypeError(checked)

        tokens = checked.tokens if known.tokens is None else len(known.tokens)
        if abs(tokens - checked.tokens) > BOUNDARY_TOKENS:
            raise VerifyFailed(
                f"it has {checked.tokens} tokens, and its text has {tokens}",
                hint="export the bundle again",
            )
        return checked

    async def _from_base(
        self, request: BuildRequest, texts: _Texts, staged: Path, on_progress: OnProgress
    ) -> protocol.Built | None:
        """Build from a base; None if there is none, or it failed and the whole is to be read.

        Errors: as for `run`.
        """
        partial = self.partials.of(request.action)
        base = partial or self._choose(request, texts)
        if base is None:
            return None

        try:
            built = await self._prefill(request, texts, staged, on_progress, base)
        except RkcachedError as error:
            if not _may_be_of_base(error):
                raise
            await asyncio.to_thread(blame_disk, staged, error)
            log.warning("build begins anew", **request.action.key._asdict(), why=error.message)
            if partial is None:
                self._bases.failed(request.model.identity, request.model.name, error)

            self.partials.drop()
            rest_s = self._worker(request).retry_in_s()
            if rest_s > PATIENCE_S:
                raise
            await asyncio.sleep(rest_s)
            return None

        if built.base_error:
            key = request.action.key
            log.info("prompt cache not continued", **key._asdict(), why=built.base_error)
        elif built.reused_tokens:
            self._bases.helped(request.model.identity)
        elif partial is None:
            why = "the runtime read everything, though a prompt cache was loaded"
            self._bases.give_up(request.model.identity, request.model.name, why)
        return built

    def _choose(self, request: BuildRequest, texts: _Texts) -> protocol.Base | None:
        """A prompt cache of the store to go on from.

        Who asks for a build of what is there gets one of the whole.
        """
        if request.action.reason == REQUESTED:
            return None
        if not self._bases.may_help(request.model.identity):
            return None
        return self._bases.choose(
            request.index,
            request.model.name,
            request.action.fingerprint.components,
            texts.prefix,
            texts.probe,
        )

    def _worker(self, request: BuildRequest) -> Worker:
        return self._workers.get(worker_model(request.engine, request.model))

    async def _prefill(
        self,
        request: BuildRequest,
        texts: _Texts,
        staged: Path,
        on_progress: OnProgress,
        base: protocol.Base | None,
    ) -> protocol.Built:
        """Prefill and prove once, when its turn comes. Errors: as for `run`."""
        build = request.action
        partial = await asyncio.to_thread(self._staging.begin, build.key)
        operation = protocol.Build(
            prefix=texts.prefix,
            probe=texts.probe,
            path=str(staged),
            verify=request.cache.verify,
            min_tokens=request.cache.min_tokens,
            base=base,
            owner=owner_in(build.fingerprint.components),
            partial=str(partial),
        )
        attempt = _Attempt(operation, on_progress)
        try:
            async with self._gates.hold(
                request.model.name,
                Priority.BUILD,
                concurrent=request.engine.concurrent,
                step_aside=attempt.step_aside,
                since=request.first_try,
            ):
                worker = await self._loaded(request)
                return await attempt.run(worker)
        except Aborted:
            if attempt.kept is not None:
                self.partials.keep(build, partial, attempt.kept)
            if attempt.aside_s is not None:
                self.costs(request.model).aside_s = attempt.aside_s
            raise
        finally:
            if not self.partials.holds(partial):
                self._staging.discard(partial)

    async def _loaded(self, request: BuildRequest) -> Worker:
        """The model's worker, with the model in memory. Errors: EngineError, WorkerError."""
        worker = self._worker(request)
        rest_s = worker.retry_in_s()
        if request.action.reason == REQUESTED and rest_s <= PATIENCE_S:
            await asyncio.sleep(rest_s)
        try:
            info = await worker.ensure()
        except (WorkerDied, WorkerTimeout) as error:  # no prompt was touched yet
            raise ModelLoadError(
                f"the model cannot be loaded: {error.message}", hint=error.hint
            ) from error
        self.costs(request.model).keeps_state = info.keeps_state
        return worker


class _Attempt:
    """One operation of a worker, which a live request may ask to step aside."""

    def __init__(self, operation: protocol.Build, on_progress: OnProgress) -> None:
        self.kept: protocol.Kept | None = None
        """The worker wrote what it had read to the partial file."""
        self.aside_s: float | None = None
        """Making room for a request took so long."""
        self._operation = operation
        self._on_progress = on_progress
        self._worker: Worker | None = None
        # When a live request came, in monotonic seconds.
        self._wanted_aside = 0.0
        self._aborting: asyncio.Task[None] | None = None

    async def run(self, worker: Worker) -> protocol.Built:
        """Errors: Aborted, EngineError, WorkerError."""
        self._worker = worker
        if self._wanted_aside:  # a request came while the model was loaded
            raise Aborted("made room for a live request")
        try:
            built = await worker.run(self._operation, self._take)
        except Aborted:
            if self._wanted_aside:
                self.aside_s = time.monotonic() - self._wanted_aside
            raise
        if not isinstance(built, protocol.Built):
            raise TypeError(built)
        return built

    def step_aside(self) -> None:
        """A live request waits behind this."""
        self._wanted_aside = time.monotonic()
        worker = self._worker
        if worker is not None and worker.info is not None and worker.info.aborts_prefill:
            self._aborting = asyncio.ensure_future(worker.abort(self._operation))

    def _take(self, event: protocol.FromWorker) -> None:
        if isinstance(event, protocol.Progress):
            self._on_progress(event.done_tokens, event.total_tokens)
        elif isinstance(event, protocol.Kept):
            self.kept = event


def _may_be_of_base(error: RkcachedError) -> bool:
    """Whether a build without a base may do better."""
    return type(error) is EngineError or isinstance(
        error, VerifyFailed | ArtifactLoadError | WorkerDied | WorkerTimeout
    )


def blame_disk(staged: Path, error: RkcachedError) -> None:
    """Find out whether an engine failed because the disk is full.

    Engines report that in different ways, and one that does not notice leaves a file that it cannot
    load. Errors: NoRoom; what was written until then tells how much is needed at the least.
    """
    if type(error) is not EngineError and not isinstance(
        error, ArtifactLoadError | VerifyFailed | WorkerDied
    ):
        return
    with contextlib.suppress(OSError):
        space = disk.free(staged.parent)
        if space.free_bytes < FULL_BYTES:
            written = staged.stat().st_size if staged.exists() else 0
            had = written + space.free_bytes
            message = f"needs more than the {had:,} bytes that were free on {space.mount}: "
            message += error.message
            raise NoRoom(message, needed_bytes=had + 1, hint=disk.ROOM) from error
