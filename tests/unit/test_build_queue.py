"""The queue of builds: what comes first, what waits, and what leaves it without being built."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rkcached.host.watch import Writing
from rkcached.plan.desired import Desired
from rkcached.plan.fingerprint import Fingerprint, fingerprint
from rkcached.plan.records import Assessment, Blocked, Build, State
from rkcached.reconcile.build_queue import REQUESTED, BuildQueue, next_retry_at
from rkcached.reconcile.demand import Demand
from rkcached.reconcile.observer import Observation
from rkcached.reconcile.waiters import Waiters
from rkcached.sources.parser import parse
from rkcached.sources.records import Key, RuntimeSource, Sources
from rkcached.store.sidecar import Inventory

A, B, C, D = Key("m", "a"), Key("m", "b"), Key("n", "c"), Key("n", "d")
TEXT, OTHER = fingerprint({"text": "one"}), fingerprint({"text": "other"})


def build(key: Key, reason: str = "missing", wanted: Fingerprint = TEXT) -> Build:
    return Build(key=key, reason=reason, fingerprint=wanted)


def queue_of(*builds: Build) -> BuildQueue:
    queue = BuildQueue()
    queue.plan((), builds, but=None)
    return queue


def take(queue: BuildQueue, now: float = 0.0, asked: tuple[Key, ...] = ()) -> Key | None:
    found, _ = queue.next(now, asked, lambda key: [str(key)], {})
    if found is not None:
        queue.started(found.key)
    return None if found is None else found.key


def test_requested_builds_come_first_and_keep_their_reason() -> None:
    """The plan would build the same prompt because it is missing."""
    queue = BuildQueue()
    queue.plan([build(B, REQUESTED)], [build(A), build(B)], but=None)
    first, _ = queue.next(0.0, (), lambda _: (), {})
    assert first == build(B, REQUESTED)
    assert take(queue) == A
    assert len(queue) == 0


def test_what_was_built_while_a_look_went_on_is_not_queued() -> None:
    """What the look saw of it is out of date."""
    queue = BuildQueue()
    queue.plan([], [build(A), build(B)], but=A)
    assert (take(queue), take(queue)) == (B, None)


def test_an_edit_goes_before_the_rest_with_its_new_text() -> None:
    """The older build of the same prompt is not made."""
    queue = queue_of(build(A), build(B))
    queue.put_first([build(B, wanted=OTHER)])
    first, _ = queue.next(0.0, (), lambda _: (), {})
    assert first == build(B, wanted=OTHER)
    assert (take(queue), take(queue)) == (A, None)


def test_a_prompt_that_was_just_built_lets_another_go_first() -> None:
    """Unless somebody waits for it."""
    queue = queue_of(build(A))
    assert take(queue) == A
    queue.plan([], [build(A), build(B)], but=None)
    assert (take(queue), take(queue)) == (B, A)
    queue.plan([], [build(A), build(B)], but=None)
    assert take(queue, asked=(A,)) == A


def test_what_stepped_aside_goes_on_before_others() -> None:
    """Though it was the last to be started."""
    queue = queue_of(build(A), build(B))
    assert take(queue) == A
    queue.step_aside(build(A))
    assert (take(queue), take(queue)) == (A, B)


def test_a_file_that_is_written_to_holds_its_build_back_and_no_other() -> None:
    """The queue says when to come back."""
    queue = queue_of(build(A), build(B))
    writing = {str(A): Writing(first=0.0, last=9.0)}
    found, _ = queue.next(10.0, (), lambda key: [str(key)], writing)
    assert found == build(B)
    assert queue.next(10.0, (), lambda key: [str(key)], writing) == (None, 14.0)
    assert queue.next(14.0, (), lambda key: [str(key)], writing)[0] == build(A)
    assert queue.next(14.0, (), lambda key: [str(key)], writing) == (None, math.inf)


def test_a_model_that_cannot_be_built_leaves_with_all_its_prompts() -> None:
    """Other models stay."""
    queue = queue_of(build(A), build(B), build(C))
    queue.drop_model("m")
    assert (take(queue), take(queue)) == (C, None)


def test_twins_of_a_new_artifact_are_adopted_and_not_built() -> None:
    """But who asked for a build gets one."""
    queue = BuildQueue()
    queue.plan([build(A, REQUESTED)], [build(B), build(C, wanted=OTHER)], but=None)
    assert queue.drop_twins(TEXT.digest)
    assert not queue.drop_twins(TEXT.digest)
    assert (take(queue), take(queue), take(queue)) == (A, C, None)


def test_what_requests_ask_for_most_comes_first() -> None:
    """Then what they asked for last, then the plan's order; it counts when a build is taken."""
    demand = Demand()
    queue = BuildQueue(demand.rank)
    queue.plan([], [build(key) for key in (A, B, C, D)], but=None)
    for key in (C, B, D, D):
        demand.asks_for(key)
    assert take(queue) == D
    demand.asks_for(C)
    assert (take(queue), take(queue), take(queue)) == (C, B, A)


def test_use_does_not_overtake_what_is_at_the_head() -> None:
    """Who waits for a build, has just edited a text, or was interrupted goes before others."""
    demand = Demand()
    demand.asks_for(C)
    queue = BuildQueue(demand.rank)
    queue.plan([build(D, REQUESTED)], [build(A), build(B), build(C)], but=None)
    queue.put_first([build(B)])
    assert [take(queue) for _ in range(2)] == [B, D]
    queue.step_aside(build(D))
    assert [take(queue) for _ in range(3)] == [D, C, A]


def test_what_stepped_aside_has_its_newest_text() -> None:
    """A look may have queued another build of it meanwhile."""
    queue = queue_of(build(B), build(A, wanted=OTHER))
    queue.step_aside(build(A))
    first, _ = queue.next(0.0, (), lambda _: (), {})
    assert first == build(A, wanted=OTHER)


def test_builds_that_are_held_back_wait_but_for_those_that_somebody_waits_for() -> None:
    """The queue says when to come back."""
    queue = queue_of(build(A), build(B), build(C))

    def next_of(now: float, *, asked: tuple[Key, ...] = (), hurried: tuple[Key, ...] = ()) -> Any:
        return queue.next(now, asked, lambda _: (), {}, held_until=9.0, hurried=hurried)

    assert next_of(1.0) == (None, 9.0)
    assert next_of(1.0, asked=(C,))[0] == build(C)
    assert next_of(1.0, hurried=(B,))[0] == build(B)
    assert next_of(1.0, hurried=(B,)) == (None, 9.0)
    assert next_of(9.0)[0] == build(A)


def test_who_hurries_names_prompts_models_or_all() -> None:
    """For as long as somebody does; nothing is left of it."""
    hurried = Waiters().hurried
    with hurried.waiting(["m/a"]), hurried.waiting(["m/a", "n"]):
        assert [key in hurried for key in (A, B, C)] == [True, False, True]
    with hurried.waiting(["*"]):
        assert all(key in hurried for key in (A, B, C))
    assert not any(key in hurried for key in (A, B, C))
    assert not hurried._names


def test_the_next_retry_is_the_earliest_that_time_alone_may_help() -> None:
    """A block without a time waits for somebody."""
    blocks = [Blocked(key=A, reason="", retry_at=at) for at in (0.0, 9.0, 5.0)]
    assessments = [Assessment(key=A, state=State.BLOCKED, action=block) for block in blocks]
    assert next_retry_at(assessments) == 5.0
    assert next_retry_at(assessments[:1]) == math.inf


def test_other_assessments_bring_their_own_plan() -> None:
    """`rkcached plan` shows the service's view of files that the caller cannot read."""
    missing = Assessment(key=A, state=State.MISSING, action=build(A))
    blocked = Assessment(key=A, state=State.BLOCKED, action=Blocked(key=A, reason="hidden"))
    seen = Observation(
        manifest=parse("version: 1\nmodels: {m: {path: m.gguf}}", file=Path("/etc/manifest.yaml")),
        sources=Sources(runtime=RuntimeSource(version="1", digest=""), models={}, prompts={}),
        desired=Desired(models={}, prompts={}, texts={}),
        inventory=Inventory(),
        assessments=(missing,),
        actions=(build(A),),
    )
    assert seen.with_assessments((blocked,)).actions == (blocked.action,)
