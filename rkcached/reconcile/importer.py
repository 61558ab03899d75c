"""Imports bundles: makes prompt caches of other machines artifacts of what is declared here.

A bundle gives nothing but bytes. The fingerprint that it names says which declared prompt they may
be for; the model of this machine proves them, and this daemon writes their sidecar. On the event
loop; what blocks runs in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rkcached.errors import (
    USE_PROVE,
    ArtifactLoadError,
    FormatError,
    NotTrusted,
    RkcachedError,
    SourceError,
    VerifyFailed,
    WorkerUnavailable,
)
from rkcached.host.logs import log
from rkcached.plan.fingerprint import changes, reason_of
from rkcached.plan.records import Build, State
from rkcached.reconcile.build_request import BuildRequest
from rkcached.reconcile.build_runner import BuildRunner
from rkcached.reconcile.builder import Builder, check_room
from rkcached.reconcile.snapshot import Published, Snapshot
from rkcached.sources.manifest import Manifest
from rkcached.sources.records import Key
from rkcached.sources.trusted_keys import TrustedKey, parse_trusted_key
from rkcached.store.bundles import BundledFile, BundledPrompt, BundleReader, parse_contents
from rkcached.store.sidecar import Imported, StoredArtifact
from rkcached.store.signatures import signer
from rkcached.store.store import Store

REASON = "imported"
"""The reason of the build in whose place an import runs."""

_AGAIN = "copy the bundle again, or export it again"

# Of the reason why a prompt is skipped, as far as the bundle's words are in it.
_MAX_LETTERS = 1000

# Prompts that would not be built either.
_SETTLED = frozenset({State.UNCACHED, State.UNCACHEABLE, State.QUARANTINED})


class Result(StrEnum):
    IMPORTED = "imported"
    SKIPPED = "skipped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result for one prompt of a bundle."""

    model: str
    """As the bundle names it; an artifact is published under the declared name."""
    prompt: str
    result: Result
    reason: str = ""


class Importer:
    def __init__(
        self,
        *,
        store: Store,
        builder: Builder,
        builds: BuildRunner,
        published: Published,
        next_look: Callable[[], Coroutine[None, None, None]],
    ) -> None:
        self._store = store
        self._builder = builder
        self._builds = builds
        self._published = published
        self._next_look = next_look
        self._running: set[asyncio.Task[list[Outcome]]] = set()

    def close(self) -> None:
        """End what is running; nothing is left of the prompt cache that is being imported."""
        for task in self._running:
            task.cancel()

    async def run(self, reader: BundleReader, *, prefill: bool) -> list[Outcome]:
        """Import what is declared and not fresh.

        `prefill`: compare each prompt cache with a prefill, and need no trusted signature. Errors:
        NotTrusted, FormatError, those of reading; WorkerUnavailable when the daemon stops. What was
        imported before an error stays.
        """
        task = asyncio.create_task(self._run(reader, prefill=prefill))
        self._running.add(task)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()  # unless it has ended, who imports has gone
            await asyncio.wait({task})
            self._running.discard(task)
        if task.cancelled():
            raise WorkerUnavailable("the daemon stops", hint="import the bundle again afterwards")
        return task.result()

    async def _run(self, reader: BundleReader, *, prefill: bool) -> list[Outcome]:
        data, signature = await reader.begin()
        manifest = self._published.now.manifest
        signed_by = ""
        try:
            signed_by = str(await asyncio.to_thread(_signed_by, manifest, data, signature))
        except NotTrusted:
            if not prefill:
                raise
        contents = await asyncio.to_thread(parse_contents, data)

        imported = Imported(at=time.time(), signed_by=signed_by)
        await self._next_look()
        declared = by_fingerprint(self._published.now)
        outcomes = []
        async with contextlib.AsyncExitStack() as held:
            targets = (target(sent, self._published.now, declared) for sent in contents.prompts)
            if any(isinstance(key, Key) for key in targets):
                await held.enter_async_context(self._builds.lent())
            for sent in contents.prompts:
                key = target(sent, self._published.now, declared)
                outcome = await self._one(reader, sent, key, imported, prefill=prefill)
                log.info(
                    "bundle read",
                    model=outcome.model,
                    prompt=outcome.prompt,
                    result=outcome.result.value,
                    reason=outcome.reason or None,
                )
                outcomes.append(outcome)
        await reader.end()
        return outcomes

    async def _one(
        self,
        reader: BundleReader,
        sent: BundledPrompt,
        key: Key | str,
        imported: Imported,
        *,
        prefill: bool,
    ) -> Outcome:
        """Import one prompt cache for `key`, or skip it. Errors: FormatError, those of reading."""
        outcome = functools.partial(Outcome, model=sent.model, prompt=sent.prompt)
        if isinstance(key, str):
            for file in sent.files:
                await reader.expect(file)
            return outcome(result=Result.SKIPPED, reason=key)

        try:
            await self._take(reader, key, sent, imported, prefill=prefill)
        except FormatError:
            raise
        except ArtifactLoadError as error:
            log.warning("bundle's prompt cache not loadable", prompt=str(key), why=error.message)
            reason = (
                "the model here cannot load the prompt cache, which arrived as it was exported "
            )
            reason += "(build it again where it was exported, and export it again)"
            return outcome(result=Result.FAILED, reason=reason)
        except RkcachedError as error:
            reason = error.message + (f" ({error.hint})" if error.hint else "")
            return outcome(result=Result.FAILED, reason=reason)
        return outcome(result=Result.IMPORTED, reason="" if str(key) == str(sent) else f"as {key}")

    async def _take(
        self,
        reader: BundleReader,
        key: Key,
        sent: BundledPrompt,
        imported: Imported,
        *,
        prefill: bool,
    ) -> None:
        """Receive, prove and publish one prompt cache. Errors: RkcachedError; those of reading."""
        others = []
        for file in (sent.text, sent.sidecar):
            await reader.expect(file)
            others.append(await _receive(reader, file))
        await reader.expect(sent.cache)
        if not all(others):
            raise VerifyFailed("its text or its sidecar is not what the bundle lists", hint=_AGAIN)

        wanted = self._published.now.desired.fingerprint(key)
        if wanted is None or wanted.digest != sent.fingerprint:
            raise SourceError(f"{key} was changed meanwhile", hint="import the bundle again")
        staged = await asyncio.to_thread(self._store.staging.begin, key)
        try:
            await self._receive_cache(reader, sent, staged)

            def take(request: BuildRequest) -> Coroutine[None, None, StoredArtifact]:
                return self._builder.take(request, staged, sent, imported, prefill=prefill)

            build = Build(key=key, reason=REASON, fingerprint=wanted)
            await self._builds.run_import(build, take)
        finally:
            self._store.staging.discard(staged)

    async def _receive_cache(self, reader: BundleReader, sent: BundledPrompt, staged: Path) -> None:
        """Write the prompt cache to `staged`. Errors: StoreError, VerifyFailed; as for reading."""
        await asyncio.to_thread(
            check_room, self._store, staged.parent, sent.cache.size_bytes, sent.text.size_bytes
        )
        stream = await asyncio.to_thread(self._store.staging.create, staged)
        try:
            append = functools.partial(self._store.staging.append, stream)
            if not await _receive(reader, sent.cache, append):
                raise VerifyFailed("its prompt cache is not what the bundle lists", hint=_AGAIN)
        finally:
            stream.close()


async def _receive(
    reader: BundleReader, file: BundledFile, write: Callable[[bytes], None] = lambda _: None
) -> bool:
    """Read a file; returns whether it is what the bundle's list says.

    Errors: those of `write` and of reading.
    """
    digest = hashlib.sha256()

    def take(piece: bytes) -> None:
        digest.update(piece)
        write(piece)

    async for piece in reader.pieces():
        work = asyncio.create_task(asyncio.to_thread(take, piece))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await work  # or it would write to a file that is closed by then
            raise
    return digest.hexdigest() == file.sha256


def by_fingerprint(snapshot: Snapshot) -> dict[str, list[Key]]:
    """The declared prompts that are to have a prompt cache of each fingerprint."""
    found: dict[str, list[Key]] = defaultdict(list)
    for key, prompt in snapshot.desired.prompts.items():
        if prompt.fingerprint is not None:
            found[prompt.fingerprint.digest].append(key)
    return found


def target(
    sent: BundledPrompt, snapshot: Snapshot, declared: Mapping[str, Sequence[Key]]
) -> Key | str:
    """The declared prompt that a prompt cache is for, or why it is for none.

    Its fingerprint decides, and not its name. `declared`: the prompts by fingerprint.
    """
    needless = ""
    for key in declared.get(sent.fingerprint, ()):
        assessment = snapshot.assessments.get(key)
        if assessment is None or assessment.state in _SETTLED:
            needless = "it was declared a moment ago; import the bundle again"
            if assessment is not None:
                needless = assessment.reason
        elif assessment.state is State.FRESH:
            needless = "fresh already"
        else:
            return key
    if needless:
        return needless

    namesake = snapshot.desired.prompts.get(Key(sent.model, sent.prompt))
    if namesake is None:
        return "not declared here"
    if namesake.fingerprint is None:
        return namesake.trouble.message if namesake.trouble else "it has no text here"
    differs = reason_of(changes(sent.components, namesake.fingerprint.components))
    return f"built from something else than is declared here: {differs[:_MAX_LETTERS]}"


def _signed_by(manifest: Manifest, data: bytes, signature: bytes | None) -> TrustedKey:
    """The trusted key that signed a bundle's list. Blocking. Errors: NotTrusted, FormatError."""
    if signature is None:
        raise NotTrusted(
            "the bundle is not signed", hint=f"export it with --sign KEYFILE; or {USE_PROVE}"
        )
    trusted = [parse_trusted_key(text) for text in manifest.cache.trust]
    if trusted and (why := _not_believed(manifest.file)):
        raise NotTrusted(
            f"cache.trust is not believed, because {why}",
            hint=f"chown root {manifest.file} && chmod go-w {manifest.file}; or {USE_PROVE}",
        )
    return signer(signature, data, trusted)


def _not_believed(manifest: Path) -> str:
    """Why this file must not say whose bundles are good; empty if it may.

    Only root and the daemon's own user may.
    """
    try:
        info = manifest.stat()
    except OSError as error:
        return f"{manifest} cannot be looked at: {error.strerror}"
    if info.st_uid not in (0, os.geteuid()):
        return f"{manifest} belongs to the user {info.st_uid}"
    if info.st_mode & 0o022:
        return f"others than its owner can write to {manifest}"
    return ""
