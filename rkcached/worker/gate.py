"""One operation at a time over all models, live requests before builds.

Concurrent clients of an NPU are reported to panic some kernels, and on CPU cores they only slow
each other. So a caller holds the gate while its engine works (`Gates` has one more for each model,
for manifests with `engine.concurrent`). A live request that has to wait behind a build asks the
build to step aside; a build that has waited long enough gets its turn all the same. Used from the
event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from enum import IntEnum
from typing import NamedTuple

BUILD_PATIENCE_S = 60.0
"""A build that has waited this long goes before live requests, once, to its end: load must not
starve it."""


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
    def free(self) -> bool:
        return not self._held

    @property
    def waiting_live(self) -> int:
        return len(self._queues[Priority.LIVE])

    @contextlib.asynccontextmanager
    async def hold(
        self,
        priority: Priority,
        *,
        step_aside: Callable[[], None] | None = None,
        since: float | None = None,
        asks: bool = True,
    ) -> AsyncIterator[None]:
        """Hold the gate.

        `step_aside` is called at most once, when a live request comes to wait behind this holder;
        not for one that does not ask.

        `since` (the loop's time) is when a build first tried: once its patience is over, it goes
        first and stays.
        """
        loop = asyncio.get_running_loop()
        first_try = loop.time() if since is None else since
        if self._held:
            await self._wait(priority, first_try, asks=asks)

        self._held = True
        patient = loop.time() - first_try <= BUILD_PATIENCE_S
        self._yield_to_live = step_aside if patient else None
        try:
            if self.waiting_live:
                self._ask_to_step_aside()
            yield
        finally:
            self._held = False
            self._yield_to_live = None
            self._pass_on()

    async def _wait(self, priority: Priority, since: float, *, asks: bool) -> None:
        waiter = _Waiter(asyncio.get_running_loop().create_future(), since)
        self._queues[priority].append(waiter)
        if priority is Priority.LIVE and asks:
            self._ask_to_step_aside()

        try:
            await waiter.turn
        except asyncio.CancelledError:
            if not waiter.turn.cancelled():
                # The turn came together with the cancellation: the next waiter takes it.
                self._held = False
                self._pass_on()
            elif waiter in self._queues[priority]:
                self._queues[priority].remove(waiter)
            raise

    def _ask_to_step_aside(self) -> None:
        ask = self._yield_to_live
        self._yield_to_live = None
        if ask is not None:
            ask()

    def _pass_on(self) -> None:
        """Wake the next waiter.

        The gate counts as held from now on, so that nobody slips in before it runs.
        """
        live = self._queues[Priority.LIVE]
        builds = self._queues[Priority.BUILD]
        for queue in (live, builds):
            # A cancelled waiter will not run any more, but has not taken itself off the queue yet.
            while queue and queue[0].turn.cancelled():
                queue.popleft()

        now = asyncio.get_running_loop().time()
        impatient = bool(builds) and now - builds[0].since > BUILD_PATIENCE_S
        queue = builds if impatient or not live else live
        if queue:
            self._held = True
            queue.popleft().turn.set_result(None)


class Gates:
    """One gate for all models, and one for each model.

    A concurrent caller holds only the latter. A model's own gate is always held, so its operations
    exclude each other also while the manifest changes `engine.concurrent`.
    """

    def __init__(self) -> None:
        self._shared = Gate()
        self._own: dict[str, Gate] = {}
        # Live callers that hold a gate or wait for one.
        self._live = 0
        # The loop's time when the last of them went.
        self._quiet_since = -math.inf
        self._when_quiet: list[Callable[[], None]] = []

    def quiet_s(self) -> float | None:
        """For how many seconds no live caller has held a gate or waited; None while one does."""
        if self._live:
            return None
        return asyncio.get_running_loop().time() - self._quiet_since

    def when_quiet(self, listener: Callable[[], None]) -> None:
        """Call it each time that the last live caller goes. It must neither raise nor wait."""
        self._when_quiet.append(listener)

    def free(self, model: str, *, concurrent: bool) -> bool:
        """Whether a caller that comes now need not wait."""
        own = self._own.get(model)
        return (own is None or own.free) and (concurrent or self._shared.free)

    @contextlib.asynccontextmanager
    async def hold(
        self,
        model: str,
        priority: Priority,
        *,
        concurrent: bool = False,
        step_aside: Callable[[], None] | None = None,
        since: float | None = None,
        asks: bool = True,
    ) -> AsyncIterator[None]:
        """As `Gate.hold`, for one model."""
        own = self._own.setdefault(model, Gate())
        async with contextlib.AsyncExitStack() as held:
            if priority is Priority.LIVE:
                held.enter_context(self._counted())
            if not concurrent:
                await held.enter_async_context(
                    self._shared.hold(priority, step_aside=step_aside, since=since, asks=asks)
                )
            await held.enter_async_context(
                own.hold(priority, step_aside=step_aside, since=since, asks=asks)
            )
            yield

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._live += 1
        try:
            yield
        finally:
            self._live -= 1
            if not self._live:
                self._quiet_since = asyncio.get_running_loop().time()
                for listener in self._when_quiet:
                    listener()
