"""The engine's time is shared by callers, not by requests."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkcached.worker.fair_queue import FairQueue

ANNE, BOB, CARL = 1001, 1002, 1003


def served(queue: FairQueue[tuple[int, float]], times: int) -> list[int]:
    """The callers of the next items, each of which takes its caller's seconds of the engine."""
    callers = []
    for _ in range(times):
        caller, seconds = queue.take()
        queue.charge(caller, seconds)
        callers.append(caller)
    return callers


def test_one_caller_is_served_in_the_order_of_coming() -> None:
    queue = FairQueue[str]()
    for item in "abc":
        queue.put(ANNE, item)
    assert [queue.take() for _ in range(3)] == ["a", "b", "c"]
    assert len(queue) == 0
    with pytest.raises(ValueError, match="empty"):
        queue.take()


def test_a_flood_of_one_lets_the_next_caller_in_at_once() -> None:
    queue = FairQueue[tuple[int, float]]()
    for _ in range(40):
        queue.put(ANNE, (ANNE, 1.0))
    assert served(queue, 5) == [ANNE] * 5
    queue.put(BOB, (BOB, 1.0))
    assert served(queue, 2) == [BOB, ANNE]


def test_who_asks_for_much_waits_for_those_who_ask_for_little() -> None:
    """Time counts, not requests: three answers of a second for one of three seconds."""
    queue = FairQueue[tuple[int, float]]()
    for _ in range(40):
        queue.put(ANNE, (ANNE, 3.0))
        queue.put(BOB, (BOB, 1.0))
    assert Counter(served(queue, 40)) == {ANNE: 10, BOB: 30}


def test_nobody_saves_up_time_by_being_silent() -> None:
    queue = FairQueue[tuple[int, float]]()
    for _ in range(100):
        queue.put(ANNE, (ANNE, 1.0))
    served(queue, 50)
    for _ in range(50):
        queue.put(BOB, (BOB, 1.0))
    assert Counter(served(queue, 20)) == {ANNE: 10, BOB: 10}


def test_one_long_request_after_the_other_is_worth_no_more_than_a_flood() -> None:
    """Bob sends his next request of four seconds when the one before is answered."""
    queue = FairQueue[tuple[int, float]]()
    for _ in range(100):
        queue.put(ANNE, (ANNE, 1.0))
    queue.put(BOB, (BOB, 4.0))
    seconds = Counter[int]()
    while sum(seconds.values()) < 60:
        caller, took = queue.take()
        seconds[caller] += int(took)
        queue.charge(caller, took)
        if caller == BOB:
            queue.put(BOB, (BOB, 4.0))
    assert abs(seconds[ANNE] - seconds[BOB]) <= 4


def test_what_is_taken_back_is_not_served() -> None:
    queue = FairQueue[str]()
    queue.put(ANNE, "a")
    queue.put(BOB, "b")
    queue.remove(ANNE, "a")
    queue.remove(ANNE, "a")
    queue.remove(CARL, "c")
    assert [queue.take() for _ in range(len(queue))] == ["b"]


@given(
    st.lists(
        st.tuples(st.sampled_from([ANNE, BOB, CARL]), st.floats(0.01, 10)), min_size=1, max_size=60
    )
)
def test_nothing_is_lost_and_each_caller_keeps_his_order(sent: list[tuple[int, float]]) -> None:
    queue = FairQueue[tuple[int, int, float]]()
    for number, (caller, seconds) in enumerate(sent):
        queue.put(caller, (number, caller, seconds))
    taken = []
    while len(queue):
        number, caller, seconds = queue.take()
        queue.charge(caller, seconds)
        taken.append((number, caller))
    assert sorted(number for number, _ in taken) == list(range(len(sent)))
    for caller in (ANNE, BOB, CARL):
        own = [number for number, by in taken if by == caller]
        assert own == sorted(own)


def test_callers_who_have_gone_are_forgotten() -> None:
    queue = FairQueue[tuple[int, float]]()
    for caller in range(1000):
        queue.put(caller, (caller, 1.0))
        served(queue, 1)
    assert len(queue._clocks) < 10
