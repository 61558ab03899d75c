"""Keeps the states of conversations, so that each goes on where it was when another came between.

A worker saves the state in its memory when something else takes its place: another conversation, a
build, the end of the process. The file is reused for the user whose conversation it is, and for
nobody else. The oldest go when there is no room in `cache.conversations.max_bytes`, and each when
nobody went on with it for `cache.conversations.keep_s`.

All of it is on the event loop; files are hashed and removed in threads.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import msgspec

from rkcached.engines.prefix import common_bytes
from rkcached.engines.registry import ENGINES
from rkcached.errors import StoreError
from rkcached.host import disk
from rkcached.host.logs import log
from rkcached.reconcile.index import Match
from rkcached.reconcile.snapshot import Published
from rkcached.serving.job import Job
from rkcached.store.conversations import ConversationFiles, Record, SavedConversation
from rkcached.worker import protocol
from rkcached.worker.held import EVERYBODY
from rkcached.worker.model import WorkerModel

DEFAULT_MAX_BYTES = 512 << 20

_LEAST_BYTES = 64
"""So much more than another state has, some 16 tokens, is worth the load of a file."""

_ENDING_BYTES = 64
"""Where the answer begins, a rendered request may end otherwise than it goes on in the next one."""


class Resumed(NamedTuple):
    """A saved conversation that a request goes on with."""

    saved: SavedConversation
    common_bytes: int
    """The request begins as its text does, for so long (UTF-8)."""

    @property
    def is_whole(self) -> bool:
        return self.common_bytes == len(self.saved.text)

    def has_more_than(self, match: Match | None) -> bool:
        """Whether it spares more than this prompt cache does, if there is one."""
        return self.common_bytes >= (match.common_bytes if match else 0) + _LEAST_BYTES

    @property
    def file(self) -> protocol.CacheFile:
        return protocol.CacheFile(
            path=str(self.saved.path),
            signature=self.saved.signature,
            fingerprint="",
            tokens=self.saved.record.tokens,
        )


class Conversations:
    """The saved conversations of all models."""

    def __init__(self, files: ConversationFiles, published: Published) -> None:
        self._files = files
        self._published = published
        # The one that was used last is the last.
        self._saved: list[SavedConversation] = []
        self._sealing: set[asyncio.Task[None]] = set()
        self._expiry: asyncio.TimerHandle | None = None
        # By model: the files that its worker may be writing.
        self._placed: dict[str, list[Path]] = {}
        # As it was when the old ones were removed the last time, and what was said last.
        self._kept_s = 0.0
        self._trouble = ""

    def of(self, viewer: int | None) -> list[SavedConversation]:
        """Those of this user; None: all."""
        return [
            saved
            for saved in self._saved
            if viewer is None or saved.record.owner in (viewer, EVERYBODY)
        ]

    @property
    def size_bytes(self) -> int:
        return sum(map(_bytes_of, self._saved))

    async def open(self) -> None:
        """Take over what an earlier daemon saved."""
        try:
            found = await asyncio.to_thread(self._files.all)
        except OSError as error:
            log.warning(
                "conversations not read",
                place=error.filename,
                error=error.strerror,
                hint="check the owner of that folder",
            )
            found = []
        self._saved = sorted(found, key=lambda saved: saved.record.used_at) + self._saved
        await self._shrink()

    def look(self) -> None:
        """The manifest, or the room on the disk, may be another now."""
        manifest = self._published.now.manifest
        is_unused = any(saved.record.model not in manifest.models for saved in self._saved)
        if is_unused or self._room() < self.size_bytes or self._keep_s() != self._kept_s:
            self._begin_to_shrink()

    async def close(self) -> None:
        """Wait until what was saved has its record. Workers save the last when they are stopped."""
        if self._expiry is not None:
            self._expiry.cancel()
        while self._sealing:
            await asyncio.wait(self._sealing)

    # For workers

    def places(self, model: WorkerModel, count: int) -> tuple[str, ...]:
        """The paths of `count` new files for states; empty if conversations are not saved."""
        unused = self._placed.pop(model.name, [])
        for path in unused:
            if os.path.lexists(path):  # Path.exists raises where the folder is closed
                self._files.discard(path)  # its worker died while it saved
        if not self._room() or not self._keep_s():
            return ()

        paths = unused[:count]
        try:
            # At least one is new: that makes sure that there is a folder.
            paths[count - 1 :] = [self._files.place(model.name)]
            while len(paths) < count:
                paths.append(self._files.place(model.name))
        except StoreError as error:
            if error.message != self._trouble:
                self._trouble = error.message
                log.warning(
                    "conversations not saved",
                    model=model.name,
                    error=error.message,
                    hint=error.hint,
                )
            return ()

        self._trouble = ""
        self._placed[model.name] = paths
        return tuple(map(str, paths))

    def take(self, model: WorkerModel, saved: protocol.Saved) -> None:
        """A state is in its file now."""
        staged = next(
            (path for path in self._placed.get(model.name, ()) if str(path) == saved.path), None
        )
        if staged is None:
            log.warning("conversation not saved", model=model.name, error="its place is unknown")
            return
        self._placed[model.name].remove(staged)
        task = asyncio.create_task(self._seal(model, staged, saved))
        self._sealing.add(task)
        task.add_done_callback(self._sealing.discard)

    async def _seal(self, model: WorkerModel, staged: Path, saved: protocol.Saved) -> None:
        record = Record(
            model=model.name,
            identity=model.identity,
            owner=saved.owner,
            text=saved.text,
            asked_bytes=saved.asked_bytes,
            tokens=saved.tokens,
            size_bytes=0,
            sha256="",
            used_at=time.time(),
        )
        try:
            sealed = await asyncio.to_thread(self._files.seal, staged, record)
        except StoreError as error:
            log.warning(
                "conversation not saved", model=model.name, error=error.message, hint=error.hint
            )
            return

        before = [other for other in self._saved if _is_earlier(other, sealed)]
        self._saved.append(sealed)
        log.debug(
            "conversation saved",
            model=model.name,
            tokens=saved.tokens,
            save_ms=round(saved.save_ms, 1),
        )
        await self._remove(before)
        await self._shrink()

    # For requests

    async def find(self, job: Job, identity: str) -> Resumed | None:
        """The saved conversation of the same user that shares the longest beginning with this."""
        while self._sealing:  # what was just saved may be the one
            await asyncio.wait(self._sealing)

        rendered = job.prompt.encode()
        best: Resumed | None = None
        for saved in self._saved:
            record = saved.record
            if (record.model, record.identity, record.owner) != (
                job.model.name,
                identity,
                job.state_owner,
            ):
                continue
            shared = common_bytes(saved.text, rendered)
            if shared > (0 if best is None else best.common_bytes):
                best = Resumed(saved, shared)

        return best

    def used(self, resumed: Resumed) -> None:
        """A request goes on with it."""
        if self._forget(resumed.saved):
            self._saved.append(_used_at(time.time(), resumed.saved))

    async def drop(self, resumed: Resumed, why: str) -> None:
        """It could not be loaded."""
        log.warning("saved conversation not loaded", model=resumed.saved.record.model, why=why)
        await self._remove([saved for saved in self._saved if saved.path == resumed.saved.path])

    # Room

    def _room(self) -> int:
        """The bytes that they may take: of their budget, and of what is free on the disk."""
        manifest = self._published.now.manifest
        max_bytes: int | None = manifest.cache.conversations.max_bytes
        if max_bytes is None:
            saves_at_once = ENGINES[manifest.engine.kind].saves_at_once
            max_bytes = DEFAULT_MAX_BYTES if saves_at_once else 0

        spare_bytes = disk.spare_bytes(self._files.root)
        if spare_bytes is None:
            return max_bytes
        return max(0, min(max_bytes, self.size_bytes + spare_bytes))

    def _keep_s(self) -> float:
        return self._published.now.manifest.cache.conversations.keep_s

    async def _shrink(self) -> None:
        """Remove what is too old or of no declared model, and the oldest until the rest fits."""
        manifest = self._published.now.manifest
        room_bytes = self._room()
        keep_s = self._kept_s = self._keep_s()
        now = time.time()
        self._saved = [_used_by(now, saved) for saved in self._saved]
        limit = now - keep_s
        gone = [
            saved
            for saved in self._saved
            if saved.record.used_at < limit
            or not keep_s
            or saved.record.model not in manifest.models
        ]
        size_bytes = self.size_bytes - sum(map(_bytes_of, gone))
        for saved in self._saved:
            if size_bytes <= room_bytes:
                break
            if saved not in gone:
                gone.append(saved)
                size_bytes -= _bytes_of(saved)

        await self._remove(gone)
        self._wait_for_expiry(keep_s)

    def _wait_for_expiry(self, keep_s: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if self._saved:
            oldest = min(saved.record.used_at for saved in self._saved)
            after_s = max(1.0, oldest + keep_s - time.time())
            self._expiry = asyncio.get_running_loop().call_later(after_s, self._begin_to_shrink)

    def _begin_to_shrink(self) -> None:
        task = asyncio.create_task(self._shrink())
        self._sealing.add(task)
        task.add_done_callback(self._sealing.discard)

    def _forget(self, gone: SavedConversation) -> bool:
        """Returns whether it was known. By its path: the time of its use may be another one now."""
        left = [saved for saved in self._saved if saved.path != gone.path]
        was_known = len(left) < len(self._saved)
        self._saved = left
        return was_known

    async def _remove(self, gone: list[SavedConversation]) -> None:
        for saved in gone:
            self._forget(saved)
            await asyncio.to_thread(self._files.remove, saved.path)


def _bytes_of(saved: SavedConversation) -> int:
    """Of its state on the disk, and of its text in memory."""
    return saved.record.size_bytes + len(saved.text)


def _used_at(moment: float, saved: SavedConversation) -> SavedConversation:
    record = msgspec.structs.replace(saved.record, used_at=moment)
    return replace(saved, record=record)


def _used_by(now: float, saved: SavedConversation) -> SavedConversation:
    """The same, not used later than now: the clock was set back since."""
    return _used_at(now, saved) if saved.record.used_at > now else saved


def _is_earlier(other: SavedConversation, saved: SavedConversation) -> bool:
    """Whether this is the same conversation as it was before its last question."""
    mine = saved.record
    theirs = other.record
    if (theirs.model, theirs.owner) != (mine.model, mine.owner):
        return False
    if theirs.identity != mine.identity:
        return True  # of no use to the worker that runs now
    return common_bytes(other.text, saved.text) >= theirs.asked_bytes - _ENDING_BYTES
