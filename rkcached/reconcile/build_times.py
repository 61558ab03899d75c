"""When builds may begin, by `cache.build` of the manifest.

Pure: the time and the silence are given. The window is in local time, so what is left of it is
computed anew at each look: a clock that is set changes it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from rkcached.sources.manifest import BuildConfig

_DAY_MINUTES = 24 * 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Builds wait."""

    why: str
    """The words after "waits": for 02:00, or until something has happened."""
    for_s: float
    """It may be over after so many seconds. Infinity: an event ends it."""


def hold(config: BuildConfig, now: float, quiet_s: float | None) -> Hold | None:
    """The reason why builds may not begin at the Unix time `now`; None if they may.

    No request has run or waited for `quiet_s`; None: one does, or nobody knows.
    """
    opens_s = opens_in_s(config.window, now) if config.window is not None else 0.0
    if config.window is not None and opens_s > 0:
        begin, _, _ = config.window.partition("-")
        return Hold(why=f"for {begin}", for_s=opens_s)

    if not config.idle_s or (quiet_s is not None and quiet_s >= config.idle_s):
        return None
    why = f"until nobody has asked for {config.idle_s:g} s"
    left_s = math.inf if quiet_s is None else config.idle_s - quiet_s
    return Hold(why=why, for_s=left_s)


def opens_in_s(window: str, now: float) -> float:
    """Seconds until a window such as 22:00-05:00 opens; 0 within it."""
    begin, end = map(_minutes, window.split("-"))
    local = time.localtime(now)
    minute = local.tm_hour * 60 + local.tm_min

    since_begin = (minute - begin) % _DAY_MINUTES
    if since_begin < (end - begin) % _DAY_MINUTES:
        return 0.0

    # Where it opens before this minute, it is tomorrow's. mktime knows when summer time begins.
    day = local.tm_mday + (minute > begin)
    opening = (local.tm_year, local.tm_mon, day, begin // 60, begin % 60, 0, 0, 0, -1)
    return max(0.001, time.mktime(opening) - now)


def _minutes(text: str) -> int:
    hours, _, minutes = text.partition(":")
    return int(hours) * 60 + int(minutes)
