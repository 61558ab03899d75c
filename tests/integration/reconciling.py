"""A reconciler without the daemon around it, for what can only be seen from inside."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import ClassVar

from conftest import Workspace

from rkcached.host.systemd import Service
from rkcached.host.watch import Writing
from rkcached.reconcile.events import Events
from rkcached.reconcile.loop import Reconciler
from rkcached.reconcile.snapshot import Published
from rkcached.reconcile.wake import Wake
from rkcached.sources.manifest_file import read_manifest
from rkcached.sources.stored_texts import StoredTexts
from rkcached.store.store import Store
from rkcached.worker.gate import Gates
from rkcached.worker.pool import Workers


class NoWatcher:
    writing: ClassVar[dict[str, Writing]] = {}

    def follow(self, wanted: object) -> None:
        pass


@contextlib.asynccontextmanager
async def reconciling(
    space: Workspace, store: Store, service: Service | None = None
) -> AsyncIterator[Reconciler]:
    """It runs over the workspace's manifest, deaf to changes of files.

    The store is opened and closed.
    """
    workers = Workers()
    reconciler = Reconciler(
        published=Published(read_manifest(space.manifest), store.digests),
        wake=Wake(),
        store=store,
        stored=StoredTexts(space.root / "state"),
        workers=workers,
        gates=Gates(),
        watcher=NoWatcher(),
        events=Events(),
        service=service,
    )
    store.open()
    task = asyncio.create_task(reconciler.run())
    try:
        yield reconciler
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await workers.stop()
        store.close()
