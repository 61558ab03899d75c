"""The gate: one holder, live requests first, and no cancellation ever loses it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkcached.worker import gate as gate_module
from rkcached.worker.gate import Gate, Gates, Priority
from tests.waiting import DEADLINE_S


class Crew:
    """Tasks that hold a gate until they are let go, and the order in which they got it."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.entered: list[str] = []
        self.inside = 0
        self.asked: list[str] = []
        self._leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, priority: Priority) -> None:
        """Start a task that wants the gate, and let it get as far as it can."""
        self._leave[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, priority))
        await self.settle()

    async def _hold(self, name: str, priority: Priority) -> None:
        ask: Callable[[], None] | None = (
            (lambda: self.asked.append(name)) if priority is Priority.BUILD else None
        )
        async with self.gate.hold(priority, step_aside=ask):
            self.inside += 1
            assert self.inside == 1
            self.entered.append(name)
            try:
                await self._leave[name].wait()
            finally:
                self.inside -= 1

    async def go(self, *names: str) -> None:
        for name in names:
            self.let_go(name)
            await self.settle()

    def let_go(self, name: str) -> None:
        self._leave[name].set()

    async def settle(self) -> None:
        """Let every task run until it waits.

        Each turn of the loop wakes whoever was woken in the last.
        """
        for _ in range(6):
            await asyncio.sleep(0)

    async def finish(self) -> None:
        for leave in self._leave.values():
            leave.set()
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def test_one_holder_at_a_time_live_before_build() -> None:
    """Builds wait for every live request that came in the meantime.

    Each kind in the order of coming.
    """
    crew = Crew()
    await crew.come("first", Priority.BUILD)
    for name, priority in [
        ("b1", Priority.BUILD),
        ("l1", Priority.LIVE),
        ("b2", Priority.BUILD),
        ("l2", Priority.LIVE),
    ]:
        await crew.come(name, priority)
    assert crew.entered == ["first"]
    await crew.finish()
    assert crew.entered == ["first", "l1", "l2", "b1", "b2"]


async def test_a_build_is_asked_once_to_step_aside_for_live_requests() -> None:
    """Not for another build, and not again for the second live request."""
    crew = Crew()
    await crew.come("build", Priority.BUILD)
    await crew.come("other", Priority.BUILD)
    assert crew.asked == []
    await crew.come("l1", Priority.LIVE)
    await crew.come("l2", Priority.LIVE)
    assert crew.asked == ["build"]
    await crew.finish()


async def test_a_live_request_that_does_not_ask_waits_for_the_end_of_a_build() -> None:
    """It still goes before the next build; another one that asks is heard."""
    gate = Gate()
    asked: list[str] = []
    order: list[str] = []

    async def hold(name: str, priority: Priority, *, asks: bool) -> None:
        async with gate.hold(priority, asks=asks):
            order.append(name)

    async with gate.hold(Priority.BUILD, step_aside=lambda: asked.append("build")):
        tasks = [asyncio.create_task(hold("other build", Priority.BUILD, asks=True))]
        tasks.append(asyncio.create_task(hold("patient", Priority.LIVE, asks=False)))
        await asyncio.sleep(0)
        assert asked == []
        tasks.append(asyncio.create_task(hold("hasty", Priority.LIVE, asks=True)))
        await asyncio.sleep(0)
        assert asked == ["build"]
    await asyncio.gather(*tasks)
    assert order == ["patient", "hasty", "other build"]


async def test_a_build_that_got_its_turn_by_patience_is_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody live is waiting already; asked again, it would never end."""
    monkeypatch.setattr(gate_module, "BUILD_PATIENCE_S", -1.0)
    crew = Crew()
    await crew.come("l1", Priority.LIVE)
    await crew.come("build", Priority.BUILD)
    await crew.come("l2", Priority.LIVE)
    await crew.go("l1")
    assert (crew.entered, crew.asked) == (["l1", "build"], [])
    await crew.finish()


async def test_a_build_that_waited_long_goes_before_live_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steady load does not starve it; until then live requests overtake it."""
    crew = Crew()
    await crew.come("l1", Priority.LIVE)
    await crew.come("build", Priority.BUILD)
    for name in ("l2", "l3"):
        await crew.come(name, Priority.LIVE)
    await crew.go("l1")
    assert crew.entered == ["l1", "l2"]
    monkeypatch.setattr(gate_module, "BUILD_PATIENCE_S", -1.0)
    await crew.go("l2")
    assert crew.entered == ["l1", "l2", "build"]
    await crew.finish()


async def test_a_waiter_that_is_cancelled_is_forgotten() -> None:
    """The next one gets its turn."""
    crew = Crew()
    await crew.come("l1", Priority.LIVE)
    await crew.come("l2", Priority.LIVE)
    await crew.come("l3", Priority.LIVE)
    crew.tasks["l2"].cancel()
    await crew.settle()
    assert crew.gate.waiting_live == 1
    await crew.go("l1")
    assert crew.entered == ["l1", "l3"]
    await crew.finish()


async def test_a_waiter_cancelled_just_after_it_got_its_turn_passes_it_on() -> None:
    """The turn and the cancellation come in one step of the loop."""
    crew = Crew()
    await crew.come("l1", Priority.LIVE)
    await crew.come("l2", Priority.LIVE)
    await crew.come("l3", Priority.LIVE)
    crew.let_go("l1")
    while crew.gate.waiting_live == 2:  # noqa: ASYNC110  the very turn of the loop matters
        await asyncio.sleep(0)
    crew.tasks["l2"].cancel()
    await crew.settle()
    assert crew.entered == ["l1", "l3"]
    await crew.finish()


async def test_a_waiter_cancelled_just_before_its_turn_is_passed_over() -> None:
    """Regression: the holder woke a waiter whose task was being cancelled.

    The gate was lost for good.
    """
    crew = Crew()
    await crew.come("l1", Priority.LIVE)
    await crew.come("l2", Priority.LIVE)
    await crew.come("l3", Priority.LIVE)
    crew.let_go("l1")
    crew.tasks["l2"].cancel()
    await crew.settle()
    assert crew.entered == ["l1", "l3"]
    await crew.finish()
    assert crew.tasks["l2"].cancelled()
    assert crew.tasks["l1"].exception() is None


async def test_a_holder_that_fails_or_is_cancelled_opens_the_gate() -> None:
    """Whatever happens inside."""
    crew = Crew()
    await crew.come("l1", Priority.LIVE)
    await crew.come("l2", Priority.LIVE)
    crew.tasks["l1"].cancel()
    await crew.settle()
    assert crew.entered == ["l1", "l2"]
    await crew.finish()
    with pytest.raises(ValueError, match="inside"):
        async with crew.gate.hold(Priority.BUILD):
            raise ValueError("inside")
    async with crew.gate.hold(Priority.LIVE):
        pass


async def test_it_is_quiet_when_no_live_caller_holds_or_waits() -> None:
    """Builds do not count. Who wants to know is told each time that the last one goes."""
    gates = Gates()
    told: list[float | None] = []
    gates.when_quiet(lambda: told.append(gates.quiet_s()))
    assert gates.quiet_s() == math.inf
    async with gates.hold("m", Priority.BUILD):
        assert gates.quiet_s() == math.inf
        live = asyncio.create_task(anext(held(gates)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert gates.quiet_s() is None
        live.cancel()
        await asyncio.gather(live, return_exceptions=True)
        assert len(told) == 1
    async with gates.hold("m", Priority.LIVE), gates.hold("n", Priority.LIVE, concurrent=True):
        assert gates.quiet_s() is None
    assert len(told) == 2
    assert told[1] is not None
    assert 0 <= told[1] < DEADLINE_S


async def held(gates: Gates) -> AsyncIterator[None]:
    async with gates.hold("m", Priority.LIVE):
        yield


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["live", "build", "go", "cancel", "go+cancel", "turn"]), st.integers(0, 9)
    ),
    max_size=25,
)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_the_gate_survives_any_history(steps: list[tuple[str, int]]) -> None:
    """Coming, leaving and cancelling in any order, also within one step of the loop.

    Afterwards it can be held.
    """

    async def play() -> None:
        crew = Crew()
        for number, (step, chosen) in enumerate(steps):
            names = list(crew.tasks)
            match step:
                case "live" | "build":
                    await crew.come(
                        str(number), Priority.LIVE if step == "live" else Priority.BUILD
                    )
                case "turn":
                    await asyncio.sleep(0)
                case _ if names:
                    if "go" in step and crew.entered:
                        crew.let_go(crew.entered[-1])
                    if "cancel" in step:
                        crew.tasks[names[chosen % len(names)]].cancel()
        await crew.finish()
        async with asyncio.timeout(DEADLINE_S), crew.gate.hold(Priority.BUILD):
            pass
        failures = [t.exception() for t in crew.tasks.values() if not t.cancelled()]
        assert failures == [None] * len(failures)

    asyncio.run(play())
