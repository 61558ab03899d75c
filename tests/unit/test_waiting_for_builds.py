"""When a request lets the build of its prompt come to its end: if that is sooner, as measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rkcached.reconcile.snapshot import BuildProgress
from rkcached.serving.waiting import sooner_to_wait
from rkcached.sources.records import Key

BEGUN = BuildProgress(
    key=Key("m", "a"),
    reason="missing",
    fingerprint="f",
    started=100.0,
    proof_s=2.0,
    aside_s=0.5,
    keeps_state=True,
)


def after(done: int, *, start: int = 0, keeps_state: bool = True) -> BuildProgress:
    """A build of 1,000 tokens that reads 100 in a second."""
    progress = replace(BEGUN, keeps_state=keeps_state).read(start, 1000, 100.0)
    return progress.read(done, 1000, 100.0 + (done - start) / 100)


@pytest.mark.parametrize(
    ("done", "since_s", "waits"),
    [
        (100, 0.0, False),
        (900, 0.0, False),
        (1000, 0.0, False),
        (1000, 1.0, False),
        (1000, 1.6, True),
        (1000, 60.0, True),
    ],
)
def test_what_was_read_serves_the_request_so_only_the_proof_counts(
    done: int, since_s: float, *, waits: bool
) -> None:
    """The rest of the proof against making room: half a second, of two."""
    progress = after(done)
    assert sooner_to_wait(progress, progress.read_at + since_s) is waits


def test_a_long_batch_makes_waiting_sooner() -> None:
    """A slow machine may need longer to step aside than for the proof."""
    progress = replace(after(300), aside_s=6.0)
    assert sooner_to_wait(progress, progress.read_at)
    assert not sooner_to_wait(replace(progress, proof_s=7.0), progress.read_at)


@pytest.mark.parametrize(("done", "waits"), [(100, False), (140, False), (160, True), (900, True)])
def test_where_nothing_is_kept_what_was_read_counts(done: int, *, waits: bool) -> None:
    """Waiting costs the proof, 2 s; interrupting costs 0.5 s, and reading those tokens again."""
    progress = after(done, keeps_state=False)
    assert sooner_to_wait(progress, progress.read_at) is waits


def test_the_rate_is_that_of_this_build() -> None:
    """Tokens of another prompt cache took no time, and do not count."""
    progress = after(960, start=950, keeps_state=False)
    assert sooner_to_wait(progress, progress.read_at)
    slow = replace(progress, read_at=progress.read_since + 10.0, total_tokens=1_000_000)
    assert sooner_to_wait(slow, slow.read_at)  # both ways read the rest


@pytest.mark.parametrize(
    "progress",
    [
        BEGUN,
        BEGUN.read(0, 1000, 101.0),
        replace(after(900), proof_s=None),
        replace(after(900), aside_s=None),
    ],
)
def test_what_nobody_has_measured_is_not_waited_for(progress: BuildProgress) -> None:
    """Then the build steps aside."""
    assert not sooner_to_wait(progress, 1000.0)
