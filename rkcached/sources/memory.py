"""Remembers what was made of files, so that a file that did not change is not read again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from rkcached.errors import SourceError
from rkcached.host.digests import Signature, settled, signature_of

Content = TypeVar("Content")


class Placed(SourceError):
    """An error of one input, and the way in the manifest to what names it."""

    def __init__(self, error: SourceError, *place: str | int) -> None:
        super().__init__(error.message, hint=error.hint)
        self.place = place


class _Made(NamedTuple, Generic[Content]):
    files: tuple[str, ...]
    signature: Signature
    content: Content


class Memory(Generic[Content]):
    """A memory of what was made of files: kept while scans ask for it and no file changes."""

    def __init__(self) -> None:
        self._now: dict[tuple[str, ...], _Made[Content]] = {}
        self._before = self._now

    def turn(self) -> None:
        """A scan begins: what the one before did not ask for is forgotten."""
        self._before, self._now = self._now, {}

    def of(self, files: tuple[str, ...], make: Callable[[tuple[str, ...]], Content]) -> Content:
        """Make it anew only if a file changed. Errors: what `make` raises."""
        infos = _infos(files)
        signature = signature_of(*infos)
        made = self._now.get(files) or self._before.get(files)
        if made is None or made.signature != signature:
            lasting = len(infos) == len(files) and settled(*infos)
            made = _Made(files, signature, make(files))
            if not lasting:  # a second change may leave the same signature
                return made.content

        self._now[made.files] = made
        return made.content


def _infos(files: tuple[str, ...]) -> list[os.stat_result]:
    """Of these files, one after the other; fewer, if one is not there."""
    infos = []
    with contextlib.suppress(OSError):
        for path in files:
            infos.append(os.stat(path))  # noqa: PERF401, PTH116 - up to the one that is not there
    return infos
