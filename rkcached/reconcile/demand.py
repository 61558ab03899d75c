"""The prompts that requests ask for: serving writes it, and builds are ordered by it.

On the event loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from rkcached.sources.records import Key


@dataclass(slots=True)
class _Use:
    count: int = 0
    # Monotonic seconds.
    last: float = 0.0


class Demand:
    def __init__(self) -> None:
        self._uses: dict[Key, _Use] = {}

    def asks_for(self, key: Key) -> None:
        """A request wants this prompt, whether it has a prompt cache now or not."""
        use = self._uses.setdefault(key, _Use())
        use.count += 1
        use.last = time.monotonic()

    def rank(self, key: Key) -> tuple[int, float]:
        """The place of a prompt among others: the smaller, the more it is asked for."""
        use = self._uses.get(key)
        return (0, 0.0) if use is None else (-use.count, -use.last)
