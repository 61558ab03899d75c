"""Thousands of faults in any order, and no wrong answer: see `storm`.

docs/reliability.md has what longer runs gave.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.integration import storm

STEPS = int(os.environ.get("RKCACHED_STORM_STEPS", "600"))
SEED = os.environ.get("RKCACHED_STORM_SEED", "")
STEPS_EACH = 50


def test_after_any_storm_every_prompt_is_fresh_and_no_answer_was_wrong() -> None:
    """1,000 steps that are the same each time.

    RKCACHED_STORM_STEPS and RKCACHED_STORM_SEED for others.
    """
    before = storm.steps
    run_state_machine_as_test(
        seed(int(SEED))(storm.Storm) if SEED else storm.Storm,
        settings=settings(
            max_examples=-(-STEPS // STEPS_EACH) * 3 // 2 + 1,
            stateful_step_count=STEPS_EACH,
            derandomize=not SEED,
            database=None,
            phases=[
                Phase.generate
            ],  # shrinking a storm takes minutes; the failure prints its steps
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
    assert storm.steps - before >= STEPS
    print(f"{storm.steps - before} steps")


def test_a_model_loaded_between_two_replacements_is_not_the_one_that_came_back() -> None:
    """The worker loaded the file that was there for a moment.

    A build of it got the fingerprint of the other.
    """
    one = storm.Storm()
    one.begin()
    try:
        one.calm()
        one.drop_events(muted=True)
        one.replace_model(model="m", seed="y")
        one.kill_worker(model="m")
        one.breathe(turns=20)
        for _ in range(2):
            one.ask(key=storm.Key("m", "a"), question="hello")
        one.replace_model(model="m", seed="x")
        one.edit(name="a.md", text="You are two.\n", how="write")
    finally:
        one.teardown()
