"""All workers of the daemon: one for each model in use, replaced when its model has changed.

Memory holds only so many models: a worker that wants to load one more waits until there is room.
The model that was idle for the longest is unloaded for it, never one that is at work.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from rkcached.host.logs import log
from rkcached.worker.model import Backoff, Deadlines, Keeper, WorkerModel
from rkcached.worker.opened import StoreReach
from rkcached.worker.supervisor import Worker, WorkerState

MEMORY_SHARE = 0.75
"""Share of the machine's memory for model files together, where no number of models is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How much may be loaded at once. None is no limit. One model may always be loaded."""

    models: int | None = None
    file_bytes: int | None = None


def room_in_memory(max_loaded: int | None) -> Room:
    """Room for `max_loaded` models; without a number, as many as the machine's memory may hold."""
    if max_loaded is not None:
        return Room(models=max_loaded)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Room(file_bytes=int(physical * MEMORY_SHARE))


# The rest of a build, without its waits for the worker, takes less: hashing, writing and syncing.
_OVERDUE_S = 30.0


class Workers:
    """All workers, by model. A caller that runs, replaces or removes a worker holds the gate."""

    def __init__(
        self,
        *,
        deadlines: Deadlines | None = None,
        backoff: Backoff | None = None,
        on_state: Callable[[Worker], None] = lambda _: None,
        room: Callable[[], Room] = Room,
        keeper: Keeper | None = None,
        reach: StoreReach | None = None,
    ) -> None:
        """`reach`: workers can open no other files of the store than it says; None: all."""
        self._keeper = keeper
        self._reach = reach
        self._tell_state = on_state
        self._room = room
        self._admitting = asyncio.Lock()
        self._changed = asyncio.Event()
        self._deadlines = deadlines or Deadlines()
        self._backoff = backoff or Backoff()
        self._workers: dict[str, Worker] = {}
        self._retired: set[asyncio.Task[None]] = set()
        self.lent = 0
        """How many clients have borrowed a model: our own workers are silent meanwhile."""

    def all(self) -> tuple[Worker, ...]:
        return tuple(self._workers.values())

    def of(self, name: str) -> Worker | None:
        """The worker of a model, whichever version of it that hosts."""
        return self._workers.get(name)

    def to_unload_for(self, newcomer: Worker, keep: Collection[str]) -> list[Worker] | None:
        """The idle models that have to go before this one fits, but none of `keep`.

        Empty if it fits; None if it would not fit without them either.
        """
        idle = [worker for worker in self._idle() if worker.model.name not in keep]
        going: list[Worker] = []
        while not self._fits(newcomer, but=going):
            if not idle:
                return None
            going.append(idle.pop(0))
        return going

    def overdue(self, since: float) -> bool:
        """Whether all workers have been silent for longer than any deadline allows.

        `since`, in monotonic seconds, is when something happened last. If so, our own deadlines
        failed to end something.
        """
        if self.lent:
            return False

        heard = max((worker.heard for worker in self.all()), default=since)
        patience_s = max(
            (worker.patience_s for worker in self.all()), default=self._deadlines.start_s
        )
        return time.monotonic() - max(heard, since) > patience_s + _OVERDUE_S

    def get(self, model: WorkerModel) -> Worker:
        """The worker that hosts exactly this; one that hosts something older is replaced."""
        worker = self._workers.get(model.name)
        if worker is not None and worker.model == model:
            worker.model = model  # the files may have been touched since
            return worker
        if worker is not None:
            self._retire(worker)

        worker = self._workers[model.name] = Worker(
            model,
            deadlines=self._deadlines,
            backoff=self._backoff,
            on_state=self._on_state,
            admit=self._admit,
            keeper=self._keeper,
            reach=self._reach,
        )
        return worker

    def drop(self, name: str) -> None:
        """Stop the worker of a model that is no longer declared."""
        if (worker := self._workers.pop(name, None)) is not None:
            self._retire(worker)

    async def stop(self) -> None:
        """Stop all. Every process is gone afterwards."""
        await asyncio.gather(*(worker.stop() for worker in self._workers.values()), *self._retired)

    def _on_state(self, worker: Worker) -> None:
        self._changed.set()
        self._tell_state(worker)

    async def _admit(self, newcomer: Worker) -> None:
        """Wait for room, and make it where a model is idle."""
        async with self._admitting:
            if self._retired:
                await asyncio.wait(self._retired)

            while not self._fits(newcomer):
                idle = self._idle()
                if not idle:
                    self._changed.clear()
                    await self._changed.wait()
                    continue
                reason = f"room for {newcomer.model.name}"
                log.info("model unloaded", model=idle[0].model.name, reason=reason)
                await idle[0].make_room()

            newcomer.admitted = True

    def _idle(self) -> list[Worker]:
        """The loaded models that do nothing, first the one that is idle for the longest."""
        idle = [
            worker
            for worker in self._workers.values()
            if worker.admitted and worker.state is WorkerState.READY
        ]
        return sorted(idle, key=lambda worker: worker.since)

    def _fits(self, newcomer: Worker, but: Collection[Worker] = ()) -> bool:
        """Whether there is room for one more model beside those that are loaded, `but` these."""
        room = self._room()
        loaded = [
            worker for worker in self._workers.values() if worker.admitted and worker not in but
        ]
        if not loaded:
            return True
        if room.models is not None and len(loaded) >= room.models:
            return False
        wanted = sum(_file_bytes(worker) for worker in (*loaded, newcomer))
        return room.file_bytes is None or wanted <= room.file_bytes

    def _retire(self, worker: Worker) -> None:
        task = asyncio.create_task(worker.stop())
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)


def _file_bytes(worker: Worker) -> int:
    files = {worker.model.spec.path, *(path for path, _ in worker.model.signatures)}
    size_bytes = 0
    for path in files:
        with contextlib.suppress(OSError):  # loading the model reports what is wrong
            size_bytes += Path(path).stat().st_size
    return size_bytes
