"""SHA-256 of files, without reading a file again that did not change.

A digest is remembered for a path together with the file's signature (device, inode, size, mtime, ctime). The signature
only ever spares work: it is no part of any identity. A file that changed within the clock's granularity of being
hashed is not remembered, because a second change could leave the same signature. The memory survives restarts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from io import BufferedReader
from pathlib import Path

import msgspec

from rkcached.errors import SourceError

_RACY_NS = 50_000_000
"""A change this close to the hashing may share its timestamp with a later one; kernels tick every 1 to 10 ms."""

_ATTEMPTS = 3

_PIECE_BYTES = 1 << 18


class Signature(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What stat(2) says about a file's identity and last change."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, info: os.stat_result) -> Signature:
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)

    @property
    def settled(self) -> bool:
        """Whether a later change is certain to alter the signature. A time in the future (clock set back) is fine."""
        return abs(time.time_ns() - self.ctime_ns) > _RACY_NS


class _Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    signature: Signature
    digest: str


class Digests:
    """The memory. One thread at a time; `file` is where it is kept between runs (None: nowhere)."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._entries: dict[str, _Entry] = {}
        self._used: set[str] = set()
        self._dirty = False
        self.hashed_files = 0
        """Files really read so far: what a test or a benchmark looks at."""
        self.steps = 0
        """Grows with each file asked for and each piece read: who waits for a long reading sees that it gets on."""
        if file is not None:
            with contextlib.suppress(OSError, ValueError, RecursionError):  # a damaged memory only costs re-hashing
                self._entries = msgspec.json.decode(file.read_bytes(), type=dict[str, _Entry])

    def digest(self, path: Path) -> str:
        """Hexadecimal SHA-256 of the file's content. Errors: OSError; SourceError if the file does not hold still."""
        return self.digest_and_signature(path)[0]

    def digest_and_signature(self, path: Path) -> tuple[str, Signature]:
        """The digest, and the signature of exactly the file that has it."""
        name = str(path)
        self._used.add(name)
        self.steps += 1
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # opening a FIFO would wait for its writer
            raise SourceError(f"{path} is not a regular file", hint="put a regular file there")
        signature = Signature.of(info)
        entry = self._entries.get(name)
        if entry is not None and entry.signature == signature:
            return entry.digest, signature
        for _ in range(_ATTEMPTS):
            with path.open("rb") as stream:
                before = Signature.of(os.fstat(stream.fileno()))
                settled = before.settled
                digest = self._sha256(stream)
                after = Signature.of(os.fstat(stream.fileno()))
            self.hashed_files += 1
            if before == after:
                if settled:
                    self._entries[name] = _Entry(before, digest)
                    self._dirty = True
                return digest, before
        raise SourceError(f"{path} is being written to", hint="it is read again as soon as it holds still")

    def _sha256(self, stream: BufferedReader) -> str:
        digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
        while size := stream.readinto(piece):
            digest.update(piece[:size])
            self.steps += 1
        return digest.hexdigest()

    def trust(self, path: Path, signature: Signature, digest: str) -> None:
        """Remember a digest that the caller computed from the very file that has `signature`."""
        self._used.add(str(path))
        if signature.settled:
            self._entries[str(path)] = _Entry(signature, digest)
            self._dirty = True

    def save(self) -> None:
        """Write the memory if it changed, keeping only the files asked for since the start. Errors: OSError."""
        if not self._dirty or self._file is None:
            return
        self._entries = {name: entry for name, entry in self._entries.items() if name in self._used}
        temporary = self._file.with_name(self._file.name + ".tmp")
        try:
            temporary.touch(mode=0o640)
            temporary.write_bytes(msgspec.json.encode(self._entries))
            temporary.replace(self._file)
        finally:  # of a full disk, half a file would take what is left
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        self._dirty = False
