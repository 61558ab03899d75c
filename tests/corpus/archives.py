"""The members of a package's archive: a wheel or a compressed tar file. Nothing in it is run."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path


class Archive:
    def __init__(self, path: Path) -> None:
        self._path = path

    def texts(self, pattern: str) -> list[tuple[str, str]]:
        """The members whose whole name matches, in order: their names and texts."""
        wanted = re.compile(pattern)
        members = self._zipped if self._path.suffix == ".whl" else self._tarred
        return [(name, data.decode()) for name, data in sorted(members(wanted))]

    def _zipped(self, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
        with zipfile.ZipFile(self._path) as archive:
            for name in archive.namelist():
                if wanted.fullmatch(name):
                    yield name, archive.read(name)

    def _tarred(self, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
        with tarfile.open(self._path) as archive:
            for member in archive:
                if member.isfile() and wanted.fullmatch(member.name):
                    stream = archive.extractfile(member)
                    assert stream is not None
                    yield member.name, stream.read()
