"""Files of builds that are not published yet, each in the folder of its model.

A model may have its folder on another disk, and a file is published by a rename. So each has a
folder for them of its own, which is all that its worker may write to.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

from rkcached.errors import StoreError
from rkcached.host import beneath, disk
from rkcached.host.digests import Signature, signature_of
from rkcached.host.regular import open_regular
from rkcached.sources.records import Key
from rkcached.store.scan import STAGING, STAGING_FOLDER, model_folders, prompt_of, strangers
from rkcached.store.writer import Writer, make_folder

# Its worker can write to the folder: what is there already is not ours.
_NEW_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Staging:
    """The files that are being built now; whatever else is staged was left behind."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._staged: set[Path] = set()
        # The state of each staged file when its content was read.
        self._sealed: dict[Path, tuple[int, int]] = {}

    def begin(self, key: Key) -> Path:
        """A path for a prompt cache to be written to. Errors: StoreError."""
        folder = self._writer.root / key.model
        if named := sorted(
            path
            for path in self._writer.spared
            if path.parent == folder and prompt_of(path.name) == key.prompt
        ):
            raise StoreError(
                f"{named[0]} is named by the manifest, and would be overwritten",
                hint="move it out of the store, or give the prompt another name",
            )

        if in_the_way := strangers(folder, key):
            raise StoreError(
                f"{in_the_way[0]} is not the store's, and would be overwritten",
                hint="move it out of the store, or let `rkcached gc --strangers` remove it",
            )

        staged = folder / STAGING_FOLDER / f"{STAGING}{key.prompt}-{secrets.token_hex(4)}"

        with self._writer.writing(folder), self._writer.folders:
            self.make_folders(key.model)
            # A folder that takes no file says so before the prefill.
            staged.touch(mode=disk.FILE_MODE)
            staged.unlink()
            self._staged.add(staged)

        return staged

    def create(self, staged: Path) -> FileIO:
        """Open a new file there, to write what another machine built. Errors: StoreError."""
        with self._writer.writing(staged):
            fd = os.open(staged, _NEW_FLAGS, disk.FILE_MODE)
        return FileIO(fd, "wb")

    def append(self, stream: FileIO, data: bytes) -> None:
        """Errors: StoreError."""
        with self._writer.writing(self._writer.root):
            view = memoryview(data)
            while view:
                view = view[stream.write(view) :]

    def signature(self, staged: Path) -> Signature:
        """The state of a staged file, for the worker that is to load it. Errors: StoreError."""
        with self._writer.writing(staged):
            return signature_of(staged.lstat())

    def make_folders(self, model: str) -> None:
        """Make a model's folder and the one in it for staged files.

        Errors: StoreError.
        """
        folder = self._writer.root / model
        parts = (folder, folder / STAGING_FOLDER)
        if not all(map(beneath.is_folder, parts)):
            with self._writer.writing(folder), self._writer.folders:
                for part in parts:
                    make_folder(part)

    def discard(self, staged: Path) -> None:
        """Forget a staged file. Idempotent."""
        self._staged.discard(staged)
        self._sealed.pop(staged, None)
        with contextlib.suppress(OSError):
            staged.unlink()

    def seal(self, staged: Path) -> tuple[int, str]:
        """Make a staged file durable and private; returns its size in bytes and SHA-256.

        Errors: StoreError.
        """
        # The worker has made it: a link there would lead to a file that is not ours to change.
        with self._writer.writing(staged), open_regular(staged, follow=False) as stream:
            os.fchmod(stream.fileno(), disk.FILE_MODE)
            os.fsync(stream.fileno())
            before = os.fstat(stream.fileno())
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            self._sealed[staged] = _content_of(before)
            self.check_sealed(staged, os.fstat(stream.fileno()))
            return before.st_size, digest

    def check_sealed(self, staged: Path, info: os.stat_result) -> None:
        """Errors: StoreError if the file has been written to since its content was read.

        A worker may keep it open, and what it writes then is not what was hashed.
        """
        if _content_of(info) != self._sealed.get(staged):
            raise StoreError(
                f"{staged.name} was changed while it was published",
                hint="it is built again; if that happens again, look at what the library does",
            )

    def expects(self, folder: Path) -> bool:
        """Whether a build will put its file into this folder of a model."""
        return any(folder in staged.parents for staged in tuple(self._staged))

    def remove_leftovers(self, paths: Iterable[Path]) -> None:
        """Remove those of these staged files that no build is writing. Errors: StoreError."""
        for path in paths:
            if not any(path.name.startswith(staged.name) for staged in tuple(self._staged)):
                with self._writer.writing(path):
                    self._writer.unlink(*path.relative_to(self._writer.root).parts)

    def sweep(self) -> None:
        """Remove what interrupted builds staged. Errors: OSError."""
        root = self._writer.root

        for folder in model_folders(root):
            for names in ((folder.name,), (folder.name, STAGING_FOLDER)):
                for name in beneath.names_in(root, *names):
                    if name.startswith(STAGING):
                        self._writer.unlink(*names, name)


def _content_of(info: os.stat_result) -> tuple[int, int]:
    """The size and time of a file: they change with its content, and not with its name.

    FAT rounds times, and may do so late: its files have sizes only.
    """
    is_coarse = info.st_mtime_ns % 1_000_000 == 0
    return info.st_size, 0 if is_coarse else info.st_mtime_ns
