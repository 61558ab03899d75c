"""Carries out one build: stage, prefill and prove in the worker, check the budget, commit.

Holds the gate only while the engine works, so that a live request never waits for a disk. Either a
complete artifact is published, or an error says why not and nothing of the attempt is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rkcached.engines.registry import ENGINES
from rkcached.errors import (
    Aborted,
    ArtifactLoadError,
    BudgetExceeded,
    EngineError,
    ModelLoadError,
    NoRoom,
    SourceError,
    StoreError,
    VerifyFailed,
    WorkerDied,
    WorkerTimeout,
)
from rkcached.host import disk
from rkcached.messages.message import Message
from rkcached.messages.template import ChatTemplate
from rkcached.messages.tools import ToolSet
from rkcached.plan.desired import DesiredModel
from rkcached.plan.records import Build, over_budget
from rkcached.plan.worker_model import worker_model
from rkcached.reconcile.build_queue import REQUESTED
from rkcached.sources.manifest import CacheConfig, EngineConfig
from rkcached.store.sidecar import Figures, Sidecar, StoredArtifact
from rkcached.store.store import Store
from rkcached.worker import protocol
from rkcached.worker.gate import Gates, Priority
from rkcached.worker.pool import Workers
from rkcached.worker.supervisor import Worker

PROBE_QUESTION = "Answer in one sentence: what are you for?"
"""Asked twice after every build: on the state in memory, and on the state from the file."""


REQUESTED_PATIENCE_S = 2.0
"""Such a build sits out a worker's rest of this length; others are planned again."""


FILES = 3
"""Of an artifact: the prompt cache, its text, its sidecar."""

FULL_BYTES = 1 << 16
"""Less is left free on a disk that was filled up: the last piece did not fit."""

# Prompt caches that agree in these have one size.
_SAME_SIZE = ("engine", "runtime.digest", "model.digest", "params.max_context_len", "prefix.digest")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """A build and what it needs."""

    action: Build
    model: DesiredModel
    text: str
    """The system message."""
    tools: ToolSet | None
    """Those that belong to the prompt."""
    engine: EngineConfig
    cache: CacheConfig
    claimed_bytes: int
    """Of the other artifacts in the store, and of files that are not the store's."""
    foreign_bytes: int
    """Of the latter."""
    needed_bytes: int
    """The least that the prompt cache takes, if that is known; else 0."""
    first_try: float
    """The loop's time when this build was first started; it may have stepped aside since."""


class Builder:
    def __init__(self, store: Store, workers: Workers, gates: Gates) -> None:
        self._store = store
        self._workers = workers
        self._gates = gates

    async def build(
        self, request: BuildRequest, on_progress: Callable[[int, int], None]
    ) -> StoredArtifact:
        """Build and publish an artifact. `on_progress` gets (tokens prefilled, tokens in total).

        Errors: Aborted when it stepped aside for a live request; any EngineError, WorkerError or
        StoreError.
        """
        action, model = request.action, request.model
        template = model.template_for(action.key.prompt)
        prefix, probe = await asyncio.to_thread(_texts, template, request.text, request.tools)
        components = action.fingerprint.components
        if hashlib.sha256(prefix.encode()).hexdigest() != components["prefix.digest"]:
            raise SourceError(
                f"{action.key} changed since the build was planned", hint="it is planned again"
            )
        started = time.monotonic()
        staged = await asyncio.to_thread(self._store.staging.begin, action.key)
        try:
            text_bytes = len(prefix.encode())
            await asyncio.to_thread(
                _check_room, self._store, staged.parent, request.needed_bytes, text_bytes
            )
            try:
                built = await self._prefill(request, prefix, probe, staged, on_progress)
            except (EngineError, WorkerDied) as error:
                await asyncio.to_thread(_blame_disk, staged, error)
                raise
            size_bytes, sha256 = await asyncio.to_thread(self._store.staging.seal, staged)
            limit = request.cache.max_bytes
            if limit is not None and request.claimed_bytes + size_bytes > limit:
                trouble = over_budget(
                    action.fingerprint.digest,
                    size_bytes,
                    request.claimed_bytes,
                    limit,
                    request.foreign_bytes,
                ).trouble
                hint = "what comes after it in the manifest makes room, if that is enough; "
                hint += f"else {trouble.hint}"
                raise BudgetExceeded(trouble.message, needed_bytes=size_bytes, hint=hint)
            sidecar = Sidecar(
                model=action.key.model,
                prompt=action.key.prompt,
                artifact=action.key.prompt + ENGINES[request.engine.kind].artifact_suffix,
                fingerprint=action.fingerprint.digest,
                components=components,
                size_bytes=size_bytes,
                sha256=sha256,
                text_sha256=components["prefix.digest"],
                tokens=built.tokens,
                built_at=time.time(),
                build_ms=(time.monotonic() - started) * 1000,
                figures=Figures(
                    prefill_ms=built.prefill_ms,
                    load_ms=built.load_ms,
                    cold_ttft_ms=built.cold_ttft_ms,
                    warm_ttft_ms=built.warm_ttft_ms,
                    verified=built.verified,
                ),
            )
            # A commit is short and must not be cut in two: it goes on even if the caller is
            # cancelled.
            retire = request.cache.keep_retired_s > 0
            commit = asyncio.create_task(
                asyncio.to_thread(
                    self._store.commit, action.key, staged, sidecar, prefix.encode(), retire=retire
                )
            )
            try:
                return await asyncio.shield(commit)
            except asyncio.CancelledError:
                await commit
                raise
            except StoreError as error:
                if _is_full(error):  # the next attempt need not prefill to find that out
                    raise NoRoom(error.message, needed_bytes=size_bytes, hint=error.hint) from error
                raise
        finally:
            self._store.staging.discard(staged)

    async def _prefill(
        self,
        request: BuildRequest,
        prefix: str,
        probe: str,
        staged: Path,
        on_progress: Callable[[int, int], None],
    ) -> protocol.Built:
        worker: Worker | None = None
        wanted_aside = False
        aside: set[asyncio.Task[None]] = set()

        operation = protocol.Build(
            prefix=prefix,
            probe=probe,
            path=str(staged),
            verify=request.cache.verify,
            min_tokens=request.cache.min_tokens,
        )

        def on_event(event: protocol.FromWorker) -> None:
            if isinstance(event, protocol.Progress):
                on_progress(event.done_tokens, event.total_tokens)

        def step_aside() -> None:
            nonlocal wanted_aside
            wanted_aside = True
            if worker is not None and worker.info is not None and worker.info.aborts_prefill:
                aside.add(asyncio.ensure_future(worker.abort(operation)))

        async with self._gates.hold(
            request.model.name,
            Priority.BUILD,
            concurrent=request.engine.concurrent,
            step_aside=step_aside,
            since=request.first_try,
        ):
            worker = self._workers.get(worker_model(request.engine, request.model))
            if request.action.reason == REQUESTED and worker.retry_in_s() <= REQUESTED_PATIENCE_S:
                await asyncio.sleep(worker.retry_in_s())
            try:
                await worker.ensure()
            except (WorkerDied, WorkerTimeout) as error:  # no prompt was touched yet
                raise ModelLoadError(
                    f"the model cannot be loaded: {error.message}", hint=error.hint
                ) from error
            if wanted_aside:  # a request came while the model was loaded
                raise Aborted("made room for a live request")
            built = await worker.run(operation, on_event)
        if not isinstance(built, protocol.Built):
            raise TypeError(built)
        return built


def size_if_same(artifact: StoredArtifact | None, components: Mapping[str, str]) -> int:
    """The size of a prompt cache with these components, if that of the artifact tells; else 0."""
    if artifact is None or any(
        artifact.sidecar.components.get(name) != components.get(name) for name in _SAME_SIZE
    ):
        return 0
    return artifact.sidecar.size_bytes


def _check_room(store: Store, folder: Path, cache_bytes: int, text_bytes: int) -> None:
    """See that an artifact may fit; retired artifacts yield.

    The one that it replaces stays until it is there.

    Errors: NoRoom when it does not fit for certain; StoreError.
    """
    with contextlib.suppress(OSError):
        space = disk.free(folder)
        if space.inodes is not None and space.inodes < FILES:
            message, hint = disk.no_inodes(space)
            raise NoRoom(message, needed_bytes=0, hint=hint)
        needed_bytes = cache_bytes + text_bytes + (FILES * disk.BLOCK_BYTES if cache_bytes else 0)
        if space.free_bytes < needed_bytes:
            store.retired.release(needed_bytes - space.free_bytes)
            space = disk.free(folder)
        if space.free_bytes < needed_bytes:
            message = (
                f"needs {needed_bytes:,} bytes, {space.free_bytes:,} are free on {space.mount}"
            )
            raise NoRoom(message, needed_bytes=cache_bytes, hint=disk.ROOM)


def _blame_disk(staged: Path, error: EngineError | WorkerDied) -> None:
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


def _is_full(error: StoreError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.ENOSPC


def _texts(template: ChatTemplate, text: str, tools: ToolSet | None) -> tuple[str, str]:
    """The prefix of a prompt and a whole request that starts with it. Errors: TemplateError."""
    shown = tools.plain() if tools is not None else []
    probe = [Message(role="system", content=text), Message(role="user", content=PROBE_QUESTION)]
    return template.prefix(text, shown), template.render(probe, shown)
