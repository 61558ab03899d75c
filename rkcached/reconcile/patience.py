"""Patience with texts and models that keep changing: when a build may begin.

On the event loop; reads no file.

A file that is uploaded grows for seconds, and each piece is another text: without patience, each
one's build would be begun, stopped by the next piece, and begun again before all others. So a build
waits while one of its files is open for writing, as far as events tell; and one that a change has
stopped waits until the changes stop, each time a little longer. Both are bounded: a file that never
rests is built now and then, and the other prompts are built in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rkcached.host.watch import Writing
from rkcached.plan.fingerprint import Fingerprint
from rkcached.sources.records import Key

SILENT_WRITER_S = 5.0
"""A writer that has the file open but writes nothing for so long is not waited for."""

LONGEST_WRITING_S = 600.0
"""Nor one that writes for so long: a large model over a slow network."""

QUIET_S = (1.0, 2.0, 4.0)
"""A build that was stopped by a change waits until the changes have stopped for so long: the first
time, the second, and so on."""

LONGEST_RESTLESS_S = 30.0
"""A build that was stopped so long ago is begun anew even if the changes never stopped."""


@dataclass(slots=True)
class _Restless:
    fingerprint: str
    stops: int
    # When a build was last stopped.
    stopped: float
    changed: float


class Patience:
    def __init__(self) -> None:
        self._restless: dict[Key, _Restless] = {}

    def stopped(self, key: Key, fingerprint: str, now: float) -> None:
        """A build was stopped because its prompt is to have this fingerprint instead."""
        before = self._restless.get(key)
        stops = before.stops + 1 if before is not None else 1
        self._restless[key] = _Restless(fingerprint, stops, stopped=now, changed=now)

    def observed(self, wanted: Callable[[Key], Fingerprint | None], now: float) -> None:
        """A look found what each prompt is to have: None if it cannot be built."""
        for key, restless in list(self._restless.items()):
            fingerprint = wanted(key)
            if fingerprint is None:
                del self._restless[key]
            elif fingerprint.digest != restless.fingerprint:
                restless.fingerprint = fingerprint.digest
                restless.changed = now

    def built(self, key: Key) -> None:
        """A build came to its end."""
        self._restless.pop(key, None)

    def due(self, key: Key, files: Iterable[str], writing: Mapping[str, Writing]) -> float:
        """The time at which a build of this prompt, made of these files, may begin.

        It is in the past if the build may begin now.
        """
        moment = 0.0
        for file in files:
            if (writer := writing.get(file)) is not None:
                moment = max(
                    moment, min(writer.last + SILENT_WRITER_S, writer.first + LONGEST_WRITING_S)
                )
        if (restless := self._restless.get(key)) is not None:
            quiet_s = QUIET_S[min(restless.stops, len(QUIET_S)) - 1]
            moment = max(
                moment, min(restless.changed + quiet_s, restless.stopped + LONGEST_RESTLESS_S)
            )
        return moment
