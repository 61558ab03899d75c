"""Has a conversation saved when it rests, on engines that save their state in a run only.

There no request may wait for the save, so it cannot be made when another conversation comes. It is
made when nobody has asked the model for a while. On the event loop.
"""

from __future__ import annotations

import asyncio

from rkcached.engines.base import RunStats
from rkcached.engines.registry import ENGINES
from rkcached.errors import RkcachedError
from rkcached.host.logs import log
from rkcached.reconcile.snapshot import Published
from rkcached.serving.conversations import Conversations
from rkcached.serving.job import Job
from rkcached.serving.reuse import Found
from rkcached.worker import protocol
from rkcached.worker.gate import Gates, Priority
from rkcached.worker.pool import Workers
from rkcached.worker.supervisor import WorkerState

REST_S = 5.0
"""A conversation rests when nobody has asked its model for so long."""


class Resting:
    def __init__(
        self,
        published: Published,
        workers: Workers,
        gates: Gates,
        conversations: Conversations,
    ) -> None:
        self._published = published
        self._workers = workers
        self._gates = gates
        self._conversations = conversations
        # By model.
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._saving: set[asyncio.Task[None]] = set()

    def answered(self, job: Job, found: Found, stats: RunStats) -> None:
        """A request was answered: from now on its conversation rests."""
        del found, stats
        engine = self._published.now.manifest.engine
        if ENGINES[engine.kind].saves_at_once or not job.goes_on:
            return

        name = job.model.name
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()
        self._timers[name] = asyncio.get_running_loop().call_later(REST_S, self._begin, name)

    def close(self) -> None:
        """Start no save any more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _begin(self, name: str) -> None:
        self._timers.pop(name, None)
        task = asyncio.create_task(self._save(name))
        self._saving.add(task)
        task.add_done_callback(self._saving.discard)

    async def _save(self, name: str) -> None:
        """Have the worker save what is in its memory, when its turn comes behind all requests."""
        concurrent = self._published.now.manifest.engine.concurrent
        async with self._gates.hold(name, Priority.BUILD, concurrent=concurrent):
            for worker in self._workers.all():
                is_idle = worker.model.name == name and worker.state is WorkerState.READY
                places = self._conversations.places(worker.model, 1) if is_idle else ()
                if not places:
                    continue
                try:
                    await worker.run(protocol.Keep(keep_at=places))
                except RkcachedError as error:
                    log.warning(
                        "conversation not saved", model=name, error=error.message, hint=error.hint
                    )
