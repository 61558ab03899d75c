"""Carries out one build: stage, prefill and prove (`prefills`), check the budget, commit.

A live request never waits for a disk. Either a complete artifact is published, or an error says why
not and nothing of the attempt is left, except for what a build that steps aside has read.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from rkcached.engines.registry import ENGINES
from rkcached.errors import (
    USE_PROVE,
    BudgetExceeded,
    EngineError,
    NoRoom,
    PromptTooShort,
    SourceError,
    StoreError,
    VerifyFailed,
    WorkerDied,
)
from rkcached.host import disk
from rkcached.plan.desired import DesiredModel
from rkcached.plan.fingerprint import Fingerprint
from rkcached.plan.probe import PROBE_QUESTION, texts_of
from rkcached.plan.records import over_budget
from rkcached.reconcile.build_request import BuildRequest
from rkcached.reconcile.prefills import BuildCosts, Prefills, blame_disk
from rkcached.sources.records import Key
from rkcached.store.bundles import BundledPrompt
from rkcached.store.sidecar import Figures, Imported, Sidecar, StoredArtifact
from rkcached.store.store import Store
from rkcached.worker import protocol
from rkcached.worker.gate import Gates
from rkcached.worker.pool import Workers

FILES = 3
"""Of an artifact: the prompt cache, its text, its sidecar."""

# Prompt caches that agree in these have one size.
_SAME_SIZE = ("engine", "runtime.digest", "model.digest", "params.max_context_len", "prefix.digest")


class Builder:
    def __init__(self, store: Store, workers: Workers, gates: Gates) -> None:
        self._store = store
        self._prefills = Prefills(store.staging, workers, gates)

    def costs(self, model: DesiredModel) -> BuildCosts:
        """The costs of builds of this model beside the prefill, as last measured."""
        return self._prefills.costs(model)

    def forget_partial(self, wanted: Callable[[Key], Fingerprint | None]) -> None:
        """Remove what a build has read that stepped aside, unless that build is still wanted."""
        self._prefills.partials.drop_unwanted(wanted)

    def close(self) -> None:
        """Remove what is left of builds that stepped aside."""
        self._prefills.partials.drop()

    async def build(
        self, request: BuildRequest, on_progress: Callable[[int, int], None]
    ) -> StoredArtifact:
        """Build and publish an artifact. `on_progress` gets (tokens prefilled, tokens in total).

        Errors: Aborted when it stepped aside for a live request; any EngineError, WorkerError or
        StoreError.
        """
        texts = await _texts(request)
        started = time.monotonic()
        staged = await asyncio.to_thread(self._store.staging.begin, request.action.key)
        try:
            await asyncio.to_thread(
                check_room,
                self._store,
                staged.parent,
                request.needed_bytes,
                len(texts.prefix.encode()),
            )
            try:
                built = await self._prefills.run(
                    request, texts.prefix, texts.probe, staged, on_progress
                )
            except (EngineError, WorkerDied) as error:
                await asyncio.to_thread(blame_disk, staged, error)
                raise
            return await self._publish(request, texts, staged, built=built, started=started)
        finally:
            self._store.staging.discard(staged)

    async def take(
        self,
        request: BuildRequest,
        staged: Path,
        sent: BundledPrompt,
        imported: Imported,
        *,
        prefill: bool,
    ) -> StoredArtifact:
        """Prove and publish the prompt cache in `staged`, which another installation built.

        `prefill`: compare it with a prefill, and not with the answer that it gave there. Errors:
        any EngineError, among them VerifyFailed; WorkerError, StoreError.
        """
        if not prefill and sent.proof.question != PROBE_QUESTION:
            raise VerifyFailed(
                "another version built it, and proved it by another question", hint=USE_PROVE
            )
        texts = await _texts(request)
        started = time.monotonic()
        expected = None if prefill else sent.proof.answer_sha256
        checked = await self._prefills.check(request, texts.prefix, texts.probe, staged, expected)
        if checked.tokens != sent.tokens:
            raise VerifyFailed(
                f"it has {checked.tokens} tokens instead of {sent.tokens}",
                hint="export the bundle again",
            )
        if checked.tokens < request.cache.min_tokens:
            raise PromptTooShort(checked.tokens, request.cache.min_tokens)

        prefill_ms, cold_ms = sent.figures.prefill_ms, sent.figures.cold_ttft_ms
        if prefill:  # both were measured here
            cold_ms = checked.cold_ttft_ms
            prefill_ms = max(0.0, cold_ms - (checked.warm_ttft_ms - checked.load_ms))
        built = protocol.Built(
            id=checked.id,
            tokens=checked.tokens,
            prefill_ms=prefill_ms,
            load_ms=checked.load_ms,
            cold_ttft_ms=cold_ms,
            warm_ttft_ms=checked.warm_ttft_ms,
            verified=checked.verified,
            answer=checked.answer,
        )
        return await self._publish(
            request, texts, staged, built=built, started=started, imported=imported
        )

    async def _publish(
        self,
        request: BuildRequest,
        texts: _Texts,
        staged: Path,
        *,
        built: protocol.Built,
        started: float,
        imported: Imported | msgspec.UnsetType = msgspec.UNSET,
    ) -> StoredArtifact:
        """Commit a proven prompt cache, if the budget has room for it. Errors: StoreError."""
        action = request.action
        components = action.fingerprint.components
        size_bytes, sha256 = await asyncio.to_thread(self._store.staging.seal, staged)
        _check_budget(request, size_bytes)
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
                reused_tokens=built.reused_tokens,
            ),
            answer_sha256=built.answer,
            imported=imported,
        )
        # A commit is short and must not be cut in two: it goes on even if the caller is cancelled.
        commit = asyncio.create_task(
            asyncio.to_thread(
                self._store.commit,
                action.key,
                staged,
                sidecar,
                texts.prefix.encode(),
                retire=request.cache.keep_retired_s > 0,
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


class _Texts(NamedTuple):
    prefix: str
    # A whole request that starts with the prefix.
    probe: str


async def _texts(request: BuildRequest) -> _Texts:
    """Render the prompt. Errors: SourceError if it is not the one that was planned."""
    key = request.action.key
    template = request.model.template_for(key.prompt)
    texts = _Texts(*await asyncio.to_thread(texts_of, template, request.text, request.tools))
    digest = hashlib.sha256(texts.prefix.encode()).hexdigest()
    if digest != request.action.fingerprint.components["prefix.digest"]:
        raise SourceError(f"{key} changed since the build was planned", hint="it is planned again")
    return texts


def _check_budget(request: BuildRequest, size_bytes: int) -> None:
    """Errors: BudgetExceeded."""
    limit = request.cache.max_bytes
    if limit is None or request.claimed_bytes + size_bytes <= limit:
        return
    trouble = over_budget(
        request.action.fingerprint.digest,
        size_bytes,
        request.claimed_bytes,
        limit,
        request.foreign_bytes,
    ).trouble
    hint = "what comes after it in the manifest makes room, if that is enough; "
    hint += f"else {trouble.hint}"
    raise BudgetExceeded(trouble.message, needed_bytes=size_bytes, hint=hint)


def size_if_same(artifact: StoredArtifact | None, components: Mapping[str, str]) -> int:
    """The size of a prompt cache with these components, if that of the artifact tells; else 0."""
    if artifact is None or any(
        artifact.sidecar.components.get(name) != components.get(name) for name in _SAME_SIZE
    ):
        return 0
    return artifact.sidecar.size_bytes


def check_room(store: Store, folder: Path, cache_bytes: int, text_bytes: int) -> None:
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


def _is_full(error: StoreError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.ENOSPC
