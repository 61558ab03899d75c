"""When builds may begin: a window of local time, and silence; the clock is given."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from rkcached.reconcile.build_times import Hold, hold, opens_in_s
from rkcached.sources.manifest import BuildConfig

BERLIN = "Europe/Berlin"
NIGHT = "02:00-05:00"
OVER_MIDNIGHT = "22:00-05:00"


@pytest.fixture(autouse=True)
def in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", BERLIN)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def at(text: str) -> float:
    """The Unix time of a local time, such as 2026-11-27 18:00:00."""
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(BERLIN)).timestamp()


@pytest.mark.parametrize(
    ("window", "now", "hours"),
    [
        (NIGHT, "18:00:00", 8),
        (NIGHT, "01:59:00", 1 / 60),
        (NIGHT, "02:00:00", 0),
        (NIGHT, "04:59:59", 0),
        (NIGHT, "05:00:00", 21),
        (OVER_MIDNIGHT, "21:00:00", 1),
        (OVER_MIDNIGHT, "22:00:00", 0),
        (OVER_MIDNIGHT, "00:00:00", 0),
        (OVER_MIDNIGHT, "04:59:59", 0),
        (OVER_MIDNIGHT, "05:00:00", 17),
        ("05:00-00:00", "23:59:59", 0),
        ("05:00-00:00", "00:00:00", 5),
    ],
)
def test_a_window_opens_at_its_local_time(window: str, now: str, hours: float) -> None:
    """Its beginning is in it and its end is not; it may go over midnight."""
    assert opens_in_s(window, at(f"2026-11-27 {now}")) == pytest.approx(hours * 3600)


def test_a_day_with_another_length_is_no_exception() -> None:
    """When summer time begins or ends in between; a time that does not exist is an hour later."""
    assert opens_in_s("04:00-05:00", at("2026-03-29 00:00:00")) == 3 * 3600
    assert opens_in_s("04:00-05:00", at("2026-10-25 00:00:00")) == 5 * 3600
    assert opens_in_s("02:30-02:40", at("2026-03-29 00:00:00")) in (1.5 * 3600, 2.5 * 3600)


def test_the_end_of_a_year_is_no_exception() -> None:
    """The window of the next day is that of the next year."""
    assert opens_in_s(NIGHT, at("2026-12-31 23:00:00")) == 3 * 3600


def test_a_clock_that_is_set_changes_the_answer() -> None:
    """Nothing of an earlier answer is kept."""
    config = BuildConfig(window=NIGHT)
    evening = hold(config, at("2026-11-27 20:00:00"), math.inf)
    assert evening == Hold(why="for 02:00", for_s=6 * 3600)
    assert hold(config, at("2026-11-28 03:00:00"), math.inf) is None
    assert hold(config, at("2026-11-27 20:00:00"), math.inf) == evening


def test_silence_is_waited_for() -> None:
    """For what is left of it; while somebody asks, for an event."""
    config = BuildConfig(idle_s=30)
    why = "until nobody has asked for 30 s"
    assert hold(config, 0.0, None) == Hold(why=why, for_s=math.inf)
    assert hold(config, 0.0, 12.0) == Hold(why=why, for_s=18.0)
    assert hold(config, 0.0, 30.0) is None
    assert hold(config, 0.0, math.inf) is None


def test_both_are_waited_for() -> None:
    """The window comes first: before it opens, silence is of no use."""
    config = BuildConfig(idle_s=30, window=NIGHT)
    evening, night = at("2026-11-27 20:00:00"), at("2026-11-28 03:00:00")
    reasons = [hold(config, now, quiet_s) for now in (evening, night) for quiet_s in (None, 31.0)]
    assert [reason.why if reason else "" for reason in reasons] == [
        "for 02:00",
        "for 02:00",
        "until nobody has asked for 30 s",
        "",
    ]


def test_by_default_builds_begin_at_once() -> None:
    """Also while somebody asks: they step aside."""
    assert hold(BuildConfig(), time.time(), None) is None
