"""Retired artifacts: no prompt uses them now, but their texts may come back.

Each lies in a folder that is named by its fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from rkcached.host import beneath
from rkcached.sources.records import Key
from rkcached.store import marks
from rkcached.store.scan import look_at_retired, prompt_of, retired_sidecar
from rkcached.store.seal import Seal
from rkcached.store.writer import Writer, make_folder


class RetiredArtifacts:
    """The retired artifacts of a store."""

    def __init__(self, writer: Writer, seal: Seal | None) -> None:
        self._seal = seal
        self._writer = writer

    def folder(self, fingerprint: str) -> Path:
        return self._writer.root / marks.RETIRED / fingerprint

    def folders(self) -> list[Path]:
        """The folders of retired artifacts."""
        names = beneath.names_in(self._writer.root, marks.RETIRED)
        folders = (self.folder(name) for name in names if marks.is_retired(name))
        return [folder for folder in folders if beneath.is_folder(folder)]

    def take_in(
        self, fingerprint: str, files: Iterable[Path], move: Callable[[Path, Path], object]
    ) -> None:
        """Move the files of an artifact here, in this order.

        An older one of the same fingerprint goes. Errors: OSError, StoreError.
        """
        target = self.folder(fingerprint)

        with self._writer.folders:
            make_folder(target.parent)
            beneath.remove(self._writer.root, marks.RETIRED, fingerprint)
            make_folder(target)
            for path in files:
                move(path, target / path.name)

    def remove(self, fingerprint: str) -> None:
        """Delete a retired artifact, its sidecar first. Idempotent. Errors: StoreError."""
        if not marks.is_retired(fingerprint):
            raise ValueError(fingerprint)
        folder = self.folder(fingerprint)

        with self._writer.writing(folder), self._writer.folders:
            for name in beneath.names_in(self._writer.root, marks.RETIRED, fingerprint):
                if name.endswith(".json"):
                    self._writer.unlink(marks.RETIRED, fingerprint, name)

            beneath.remove(self._writer.root, marks.RETIRED, fingerprint)

    def remove_of(self, key: Key) -> None:
        """Delete all retired artifacts that were built for this prompt. Errors: StoreError."""
        for folder in self.folders():
            sidecar = retired_sidecar(folder)
            if not isinstance(sidecar, str) and (sidecar.model, sidecar.prompt) == key:
                self.remove(folder.name)

    def release(self, needed_bytes: int) -> None:
        """Delete retired artifacts, the oldest first, until so many bytes are free or none is left.

        Errors: StoreError.
        """
        released_bytes = 0

        for folder in sorted(self.folders(), key=lambda path: path.lstat().st_mtime_ns):
            if released_bytes >= needed_bytes:
                return
            released_bytes += beneath.size_of(folder)
            self.remove(folder.name)

    def remove_incomplete(self, folders: Iterable[Path]) -> None:
        """Remove those of these folders that hold no whole artifact, and nothing else.

        Errors: StoreError.
        """
        for folder in folders:
            with self._writer.writing(folder), self._writer.folders:
                if look_at_retired(folder, self._seal) is not None:
                    continue  # it was completed meanwhile
                if not self.strangers_in(folder.name):
                    beneath.remove(self._writer.root, marks.RETIRED, folder.name)

    def strangers_in(self, fingerprint: str) -> list[str]:
        """The names in the folder of a retired artifact that the store gives to nothing there.

        Errors: OSError.
        """
        names = beneath.names_in(self._writer.root, marks.RETIRED, fingerprint)
        return [name for name in names if not prompt_of(name)]
