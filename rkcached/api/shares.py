"""Shares of what the daemon has for its clients: nobody can take all of it.

A caller is a user: the uid of the process that opened the connection. On the event loop.
"""

from __future__ import annotations

from collections import Counter


class Share:
    """An amount of something that all callers have together, and the most that one may hold."""

    def __init__(self, *, each: int, total: int) -> None:
        self.each = each
        self._total = total
        self._held = Counter[int]()

    def take(self, caller: int, amount: int = 1) -> bool:
        """Give the caller so much more. False, and nothing is taken, if that is too much."""
        if self._held[caller] + amount > self.each or self._held.total() + amount > self._total:
            return False
        self._held[caller] += amount
        return True

    def give_back(self, caller: int, amount: int = 1) -> None:
        self._held[caller] -= amount
        if not self._held[caller]:
            del self._held[caller]
