"""A queue that shares the engine's time between its callers, however many requests each sends.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): each caller has a clock, which goes on by the
time that the engine worked for him. Next is the caller whose clock is furthest behind; his requests
keep their order. A caller who comes, or comes back, begins at the clock of the request that was
chosen last: nobody saves up a right to the engine, and nobody waits behind all that another sent
before. Used from the event loop only.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    def __init__(self) -> None:
        # By caller; those who have nothing here are left out.
        self._items: dict[int, deque[Item]] = {}
        # Seconds, by caller; who is not here, or behind `_now`, is at `_now`.
        self._clocks: dict[int, float] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._items.values()))

    def put(self, caller: int, item: Item) -> None:
        if caller not in self._items:
            self._items[caller] = deque()
            self._clocks[caller] = self._clock(caller)
        self._items[caller].append(item)

    def take(self) -> Item:
        """Errors: ValueError if it is empty."""
        caller = min(self._items, key=self._clock)  # of equals, the one who came first
        self._now = self._clock(caller)
        item = self._items[caller].popleft()
        if not self._items[caller]:
            del self._items[caller]
        return item

    def remove(self, caller: int, item: Item) -> None:
        """Take it out, if it is still there."""
        items = self._items.get(caller)
        if items is None or item not in items:
            return
        items.remove(item)
        if not items:
            del self._items[caller]

    def charge(self, caller: int, seconds: float) -> None:
        """The engine worked for this caller for so long."""
        self._clocks[caller] = self._clock(caller) + seconds
        if not self._items:  # nobody was kept waiting
            self._now = max(self._clocks.values())
        for other, clock in list(self._clocks.items()):
            if clock <= self._now and other not in self._items:
                del self._clocks[other]

    def _clock(self, caller: int) -> float:
        return max(self._now, self._clocks.get(caller, 0.0))
