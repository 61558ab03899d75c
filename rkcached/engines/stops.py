"""Finds stop strings in a stream of text: how much may be shown, and whether it ends. Pure."""

from __future__ import annotations


class StopStrings:
    """Holds back text that may be the beginning of a stop string until that is decided."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that can be shown now; after `found`, nothing more."""
        if self.found:
            return ""
        if not self._stops:
            return text

        text = self._held + text
        # The stop string that is complete first ends the answer.
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(ends)[1]]

        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def rest(self) -> str:
        """Return the text that was held back, once the stream has ended."""
        rest = self._held
        self._held = ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that `stop` begins with."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
