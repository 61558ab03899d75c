"""Verdicts on disk: why a fingerprint has no artifact, and when it is tried again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from rkcached.host import beneath, disk
from rkcached.host.regular import read_regular
from rkcached.plan.records import Verdict
from rkcached.sources.records import Key
from rkcached.store import marks
from rkcached.store.scan import MAX_RECORD_BYTES
from rkcached.store.writer import Writer, make_folder


class Verdicts:
    """The verdicts of a store, one for each prompt at most."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def write(self, key: Key, verdict: Verdict) -> None:
        """Remember why a fingerprint has no artifact. Errors: StoreError."""
        path = self._path(key)

        with self._writer.writing(path):
            for folder in (path.parent.parent, path.parent):
                make_folder(folder)

            temporary = path.with_name(f".{path.name}.tmp")
            temporary.unlink(missing_ok=True)
            disk.write_new(temporary, msgspec.json.encode(verdict))
            temporary.replace(path)

    def read(self, key: Key) -> Verdict | None:
        """The verdict on a prompt. A damaged one only costs one more attempt."""
        path = self._path(key)

        try:
            data = read_regular(path, MAX_RECORD_BYTES, follow=False)
            return msgspec.json.decode(data, type=Verdict)
        except (OSError, ValueError, RecursionError):
            return None

    def all(self) -> Iterator[tuple[Key, Verdict]]:
        """Every verdict that can be read."""
        for path in self._writer.root.glob(f"{marks.VERDICTS}/*/*.json"):
            key = Key(path.parent.name, path.stem)
            if (verdict := self.read(key)) is not None:
                yield key, verdict

    def clear(self, key: Key) -> None:
        with contextlib.suppress(OSError):
            self._writer.unlink(marks.VERDICTS, key.model, f"{key.prompt}.json")

    def sweep(self) -> None:
        """Remove what an interrupted write left. Errors: OSError."""
        root = self._writer.root

        for model in beneath.names_in(root, marks.VERDICTS):
            for name in beneath.names_in(root, marks.VERDICTS, model):
                if name.startswith(".") and name.endswith(".tmp"):
                    self._writer.unlink(marks.VERDICTS, model, name)

    def _path(self, key: Key) -> Path:
        return self._writer.root / marks.VERDICTS / key.model / f"{key.prompt}.json"
