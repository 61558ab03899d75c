"""One operation at a time over all models, live requests before builds.

Concurrent clients of an NPU are reported to panic some kernels, and on CPU cores they only slow
each other. So a caller holds the gate while its engine works (`Gates` has one more for each model,
for manifests with `engine.concurrent`). Live requests share its time by their callers
(`fair_queue`). One that has to wait behind a build asks the build to step aside; a build that has
waited long enough gets its turn all the same. Used from the event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from enum import IntEnum
from typing import NamedTuple

from rkcached.worker.fair_queue import FairQueue
from rkcached.worker.held import NOBODY

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
        self._live = FairQueue[_Waiter]()
        self._builds = deque[_Waiter]()
        self._held = False
        self._yield_to_live: Callable[[], None] | None = None

    @property
    def free(self) -> bool:
        return not self._held

    @property
    def waiting_live(self) -> int:
        return len(self._live)

    @contextlib.asynccontextmanager
    async def hold(
        self,
        priority: Priority,
        *,
        caller: int = NOBODY,
        step_aside: Callable[[], None] | None = None,
        since: float | None = None,
        asks: bool = True,
    ) -> AsyncIterator[None]:
        """Hold the gate. `caller`: the uid of the client, for a live request.

        `step_aside` is called at most once, when a live request comes to wait behind this holder;
        not for one that does not ask.

        `since` (the loop's time) is when a build first tried: once its patience is over, it goes
        first and stays.
        """
        loop = asyncio.get_running_loop()
        first_try = loop.time() if since is None else since
        if self._held:
            await self._wait(priority, caller, first_try, asks=asks)

        self._held = True
        entered = loop.time()
        patient = loop.time() - first_try <= BUILD_PATIENCE_S
        self._yield_to_live = step_aside if patient else None
        try:
            if self.waiting_live:
                self._ask_to_step_aside()
            yield
        finally:
            self._held = False
            self._yield_to_live = None
            if priority is Priority.LIVE:
                self._live.charge(caller, loop.time() - entered)
            self._pass_on()

    async def _wait(self, priority: Priority, caller: int, since: float, *, asks: bool) -> None:
        waiter = _Waiter(asyncio.get_running_loop().create_future(), since)
        if priority is Priority.BUILD:
            self._builds.append(waiter)
        else:
            self._live.put(caller, waiter)
            if asks:
                self._ask_to_step_aside()

        try:
            await waiter.turn
        except asyncio.CancelledError:
            if not waiter.turn.cancelled():
                # The turn came together with the cancellation: the next waiter takes it.
                self._held = False
                self._pass_on()
            elif priority is Priority.LIVE:
                self._live.remove(caller, waiter)
            elif waiter in self._builds:
                self._builds.remove(waiter)
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
        while (waiter := self._take_next()) is not None:
            # A cancelled waiter will not run any more, but has not taken itself off the queue yet.
            if not waiter.turn.cancelled():
                self._held = True
                waiter.turn.set_result(None)
                return

    def _take_next(self) -> _Waiter | None:
        now = asyncio.get_running_loop().time()
        impatient = bool(self._builds) and now - self._builds[0].since > BUILD_PATIENCE_S
        if len(self._live) and not impatient:
            return self._live.take()
        return self._builds.popleft() if self._builds else None


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
        caller: int = NOBODY,
        concurrent: bool = False,
        step_aside: Callable[[], None] | None = None,
        since: float | None = None,
        asks: bool = True,
    ) -> AsyncIterator[None]:
        """As `Gate.hold`, for one model."""
        own = self._own.setdefault(model, Gate())
        hold = functools.partial(
            Gate.hold,
            priority=priority,
            caller=caller,
            step_aside=step_aside,
            since=since,
            asks=asks,
        )
        async with contextlib.AsyncExitStack() as held:
            if priority is Priority.LIVE:
                held.enter_context(self._counted())
            if not concurrent:
                await held.enter_async_context(hold(self._shared))
            await held.enter_async_context(hold(own))
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
