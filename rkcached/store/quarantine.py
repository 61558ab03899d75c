"""The quarantine: artifacts that failed when they were used, kept for a post-mortem.

What others put where a file of ours goes is moved here, too.
"""

from __future__ import annotations

import contextlib
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from rkcached.host import beneath
from rkcached.sources.records import Key
from rkcached.store import marks
from rkcached.store.writer import DIRECTORY_MODE, Writer, make_folder

MAX_QUARANTINED = 8
"""Artifacts kept for a post-mortem; the oldest goes first."""


class Quarantine:
    """The folders of the quarantine, one for each artifact in it."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def keep(self, key: Key, paths: Iterable[Path], prefix: str = "") -> None:
        """Move these into a new folder of the quarantine, where the oldest make room.

        Errors: StoreError.
        """
        kept = self._writer.root / marks.QUARANTINE

        with self._writer.writing(kept):
            make_folder(kept)
            target = kept / f"{prefix}{key.model}--{key.prompt}--{secrets.token_hex(4)}"
            target.mkdir(mode=DIRECTORY_MODE)
            for path in paths:
                if path not in self._writer.spared and beneath.is_folder(path.parent):
                    with contextlib.suppress(FileNotFoundError):
                        path.rename(target / path.name)

            for old in self.folders()[:-MAX_QUARANTINED]:
                self._drop(old)

    def folders(self) -> list[Path]:
        """The folders that the store put into the quarantine, the oldest first."""
        kept = self._writer.root / marks.QUARANTINE
        ages = []

        for name in beneath.names_in(self._writer.root, marks.QUARANTINE):
            with contextlib.suppress(FileNotFoundError):
                info = (kept / name).lstat()
                if marks.is_quarantined(name) and stat.S_ISDIR(info.st_mode):
                    ages.append((info.st_mtime_ns, kept / name))

        return [path for _, path in sorted(ages)]

    def sizes(self) -> Iterator[tuple[Path, int]]:
        """The folders with their bytes, the oldest first."""
        for folder in self.folders():
            yield folder, beneath.size_of(folder)

    def shrink(self, kept: dict[Path, int], max_bytes: float) -> None:
        """Remove the first of these folders until the rest has at most `max_bytes`.

        What is removed is taken out of `kept`, which has the bytes of each. Errors: StoreError.
        """
        excess_bytes = sum(kept.values()) - max_bytes

        for folder, size_bytes in tuple(kept.items()):
            if excess_bytes > 0:
                with self._writer.writing(folder):
                    self._drop(folder)

                del kept[folder]
                excess_bytes -= size_bytes

    def _drop(self, kept: Path) -> None:
        """Remove a folder of the quarantine; what cannot be removed stays, and is tried again."""
        with contextlib.suppress(OSError):
            beneath.remove(self._writer.root, marks.QUARANTINE, kept.name)
