"""Wakes the reconciler when somebody noticed a change, and waits until changes settle.

Made before the parts that wake it, so that the watcher needs no reconciler. On the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

SETTLE_S = 0.2
"""Quiet time after the last event before looking: an editor's save is several events."""

MAX_SETTLE_S = 5.0
"""Look at the latest this long after the first event, even if they never stop."""

MAX_CHANGED_FILES = 64
"""More changed files than these are not kept: a look at everything comes anyway."""


class Wake:
    """A request for another look, with the files that are known to have changed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._first_event = 0.0
        self._last_event = 0.0
        # Do not wait for events to settle. The first look begins at once.
        self._hurry = True
        self._changed: set[str] = set()

    def look_again(self, changed: Iterable[str] = (), *, now: bool = False) -> None:
        """Ask for a look: these files may have changed, or nobody knows what.

        `now` skips waiting for it to settle.
        """
        if len(self._changed) <= MAX_CHANGED_FILES:
            self._changed.update(changed)

        moment = asyncio.get_running_loop().time()
        if not self._event.is_set():
            self._first_event = moment
        self._last_event = moment
        self._hurry = self._hurry or now
        self._event.set()

    def is_set(self) -> bool:
        """Whether a look was asked for that has not begun."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Return when a look is asked for."""
        await self._event.wait()

    async def settle(self) -> None:
        """Wait until events have been quiet for a while, so that no half of a save is looked at."""
        loop = asyncio.get_running_loop()
        while self._event.is_set() and not self._hurry:
            quiet_at = min(self._last_event + SETTLE_S, self._first_event + MAX_SETTLE_S)
            if loop.time() >= quiet_at:
                break
            await asyncio.sleep(quiet_at - loop.time())

        self._hurry = False
        self._event.clear()

    def take_changed(self) -> set[str]:
        """The files that changed since this was last called. Empty if they are too many to name."""
        changed, self._changed = self._changed, set()
        return changed if len(changed) <= MAX_CHANGED_FILES else set()
