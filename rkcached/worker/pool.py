"""All workers of the daemon: one for each model in use, replaced when what it must host has changed."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rkcached.worker.supervisor import SCRATCH_PREFIX, Backoff, Deadlines, Worker, WorkerModel

_OVERDUE_S = 30.0
"""What a build does besides waiting for its worker takes less: hashing, writing and syncing one file."""


class Workers:
    """All workers, by model. Who runs an operation, replaces or removes a worker holds the gate."""

    def __init__(
        self,
        *,
        deadlines: Deadlines | None = None,
        backoff: Backoff | None = None,
        on_state: Callable[[Worker], None] = lambda _: None,
    ) -> None:
        self._on_state = on_state
        self._deadlines = deadlines or Deadlines()
        self._backoff = backoff or Backoff()
        self._workers: dict[str, Worker] = {}
        self._retired: set[asyncio.Task[None]] = set()

    def all(self) -> tuple[Worker, ...]:
        return tuple(self._workers.values())

    def overdue(self, since: float) -> bool:
        """Whether nothing was heard of any worker, nor happened `since` (monotonic seconds), for longer than may be.

        Then our own deadlines failed to end something.
        """
        heard = max((worker.heard for worker in self.all()), default=since)
        patience_s = max((worker.patience_s for worker in self.all()), default=self._deadlines.start_s)
        return time.monotonic() - max(heard, since) > patience_s + _OVERDUE_S

    def get(self, model: WorkerModel) -> Worker:
        """The worker that hosts exactly this; one that hosts something older is replaced."""
        worker = self._workers.get(model.name)
        if worker is not None and worker.model == model:
            return worker
        if worker is not None:
            self._retire(worker)
        worker = self._workers[model.name] = Worker(
            model, deadlines=self._deadlines, backoff=self._backoff, on_state=self._on_state
        )
        return worker

    def drop(self, name: str) -> None:
        """Stop the worker of a model that is no longer declared."""
        if (worker := self._workers.pop(name, None)) is not None:
            self._retire(worker)

    async def stop(self) -> None:
        """Stop all. Every process is gone afterwards."""
        await asyncio.gather(*(worker.stop() for worker in self._workers.values()), *self._retired)

    def _retire(self, worker: Worker) -> None:
        task = asyncio.create_task(worker.stop())
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)


def sweep_scratch() -> None:
    """Remove the scratch directories of daemons that were killed: those whose name has the pid of no process."""
    for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*-*"):
        pid = path.name.removeprefix(SCRATCH_PREFIX).partition("-")[0]
        if not pid.isdigit():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # somebody else's
