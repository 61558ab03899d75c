"""Stops the workers of models that are gone, once they have given their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.snapshot import Published
from rkcached.sources.records import Trouble
from rkcached.worker.gate import Gates, Priority
from rkcached.worker.pool import Workers


class SurplusWorkers:
    """The workers that nobody will need any more."""

    def __init__(self, workers: Workers, gates: Gates, published: Published) -> None:
        self._workers = workers
        self._gates = gates
        self._published = published
        self._tasks: set[asyncio.Task[None]] = set()

    def cancel(self) -> None:
        """Let those that still answer run on; nothing stops them later."""
        for task in self._tasks:
            task.cancel()

    def stop(self, models: Mapping[str, DesiredModel | Trouble]) -> None:
        """Stop the workers of other models than these, which a look found.

        That of a model that changed is replaced when it is next used.
        """
        wanted = {name for name, model in models.items() if isinstance(model, DesiredModel)}
        for name in {worker.model.name for worker in self._workers.all()} - wanted:
            task = asyncio.create_task(self._stop(name))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _stop(self, name: str) -> None:
        """Apart from the look, which need not wait for the answers that are running."""
        async with self._gates.hold(name, Priority.BUILD):
            if not isinstance(self._published.now.model(name), DesiredModel):
                self._workers.drop(name)
