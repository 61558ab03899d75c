"""One operation at a time over all models, live requests before builds.

Concurrent clients of an NPU are reported to panic some kernels, and on CPU cores they only slow each other. So whoever
wants an engine to work holds the gate. A live request that has to wait behind a build asks it to step aside; a build
that has stepped aside, or waited, long enough gets its turn all the same. Used from the event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from enum import IntEnum
from typing import NamedTuple

BUILD_PATIENCE_S = 30.0
"""A build that waited this long goes before live requests: steady load must not starve it."""


class Priority(IntEnum):
    LIVE = 0
    BUILD = 1


class _Waiter(NamedTuple):
    turn: asyncio.Future[None]
    since: float


class Gate:
    def __init__(self) -> None:
        self._queues: dict[Priority, deque[_Waiter]] = {priority: deque() for priority in Priority}
        self._held = False
        self._yield_to_live: Callable[[], None] | None = None

    @property
    def waiting_live(self) -> int:
        return len(self._queues[Priority.LIVE])

    @contextlib.asynccontextmanager
    async def hold(self, priority: Priority, *, step_aside: Callable[[], None] | None = None) -> AsyncIterator[None]:
        """Hold the gate. `step_aside` is called at most once, when a live request comes to wait behind this holder."""
        if self._held:
            await self._wait(priority)
        self._held = True
        self._yield_to_live = step_aside
        try:
            if self.waiting_live:
                self._ask_to_step_aside()
            yield
        finally:
            self._held = False
            self._yield_to_live = None
            self._pass_on()

    async def _wait(self, priority: Priority) -> None:
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop.create_future(), loop.time())
        self._queues[priority].append(waiter)
        if priority is Priority.LIVE:
            self._ask_to_step_aside()
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if not waiter.turn.cancelled():
                self._held = False
                self._pass_on()  # the turn came together with the cancellation: somebody else takes it
            elif waiter in self._queues[priority]:
                self._queues[priority].remove(waiter)
            raise

    def _ask_to_step_aside(self) -> None:
        ask, self._yield_to_live = self._yield_to_live, None
        if ask is not None:
            ask()

    def _pass_on(self) -> None:
        """Wake the next waiter. The gate counts as held from now on, so that nobody slips in before it runs."""
        live, builds = self._queues[Priority.LIVE], self._queues[Priority.BUILD]
        for queue in (live, builds):
            while queue and queue[0].turn.cancelled():  # it will not run any more, but does not know it yet
                queue.popleft()
        now = asyncio.get_running_loop().time()
        queue = builds if builds and (not live or now - builds[0].since > BUILD_PATIENCE_S) else live
        if queue:
            self._held = True
            queue.popleft().turn.set_result(None)
