"""SHA-256 of files, without reading a file again that did not change.

A digest is remembered for a path together with the file's signature (device, inode, size, mtime,
ctime). The signature only ever spares work: it is no part of any identity. A file that changed so
recently that a second change could leave the same signature is not remembered. How long that is
depends on the file system, and the file's own times show it. The memory survives restarts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NewType

import msgspec

from rkcached.errors import SourceError, SourceUnsettled
from rkcached.host import disk
from rkcached.host.regular import open_regular, read_regular

# A change may share its time with one that comes so much later: kernels tick every 1 to 10 ms.
_FINE_NS = 50_000_000

# The same for times that are multiples of the first number. Whole seconds are what FAT and exFAT
# (ticks of 1 or 2 s), ext3, JFFS2, HFS+ and some file servers have. A finer file system has one now
# and then as well, or a program set it: that costs one more reading, and only of a file that
# changed within the last 3 s. One second of them allows for a file server whose clock differs.
_COARSE_NS = ((1_000_000_000, 3_000_000_000), (100_000_000, 300_000_000))

# The version of the memory's file. The first one, without a number, was kept by a rule that coarse
# times could deceive.
_VERSION = 2

_ATTEMPTS = 3
_MAX_BYTES = 64 << 20  # of the file of digests: some 300,000 files

_PIECE_BYTES = 1 << 18


Signature = NewType("Signature", bytes)
"""Identity and last change of one or several files, by stat(2). Bytes are small: many are kept."""

_FIELDS = struct.Struct("<QQQqq")


def signature_of(*infos: os.stat_result) -> Signature:
    """Device, inode, size, mtime and ctime of each, one after the other."""
    return Signature(
        b"".join(
            _FIELDS.pack(i.st_dev, i.st_ino, i.st_size, i.st_mtime_ns, i.st_ctime_ns) for i in infos
        )
    )


def settled(*infos: os.stat_result) -> bool:
    """Whether a later change is certain to alter the signature.

    A time in the future (clock set back) is fine.
    """
    return _unsettled_ns(*infos) == 0


def _unsettled_ns(*infos: os.stat_result) -> int:
    """Nanoseconds until these files are settled if nothing changes them.

    Both times count: some file systems have no time of the last change of their own, and show an
    older one instead.
    """
    now = time.time_ns()
    wait_ns = 0
    for info in infos:
        for moment in (info.st_ctime_ns, info.st_mtime_ns):
            window_ns = next(
                (window for unit, window in _COARSE_NS if moment % unit == 0), _FINE_NS
            )
            if abs(now - moment) <= window_ns:
                wait_ns = max(wait_ns, moment + window_ns - now + 1)

    return wait_ns


class _Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    signature: Signature
    digest: str


class _Kept(msgspec.Struct, frozen=True):
    """The memory between two runs."""

    version: int
    files: dict[str, _Entry]
    mac: str = ""


@dataclass(slots=True, kw_only=True)
class Reading:
    """The file that is being read now, and how far."""

    path: str
    total_bytes: int
    done_bytes: int = 0


class Digests:
    """The memory. One thread at a time."""

    def __init__(
        self, file: Path | None = None, *, sign: Callable[[bytes], str] | None = None
    ) -> None:
        """`file` is where it is kept between runs; None: nowhere.

        `sign` makes a code of what is kept, without which it is not believed: whoever can write the
        file could have any file taken for another.
        """
        self._file = file
        self._sign = sign
        # The files that were asked for since the start.
        self._entries: dict[str, _Entry] = {}
        # The files that were known at the start, and that nobody has asked for yet.
        self._before: dict[str, _Entry] = {}
        self._dirty = False
        self.hashed_files = 0
        """The number of files that were really read. Tests and benchmarks look at it."""
        self.steps = 0
        """Grows with each file asked for and each piece read. Whoever waits for a long reading
        sees that it gets on."""
        self.reading: Reading | None = None
        """The file that is being read. Other threads only read this attribute."""

        if file is not None:
            # A damaged memory only costs re-hashing.
            with contextlib.suppress(OSError, ValueError, RecursionError):
                kept = msgspec.json.decode(read_regular(file, _MAX_BYTES, follow=False), type=_Kept)
                if kept.version == _VERSION and kept.mac == self._code(kept):
                    self._before = kept.files

    def digest(self, path: Path) -> str:
        """Hexadecimal SHA-256 of the file's content.

        Errors: OSError; SourceError if the file does not hold still.
        """
        return self.digest_and_signature(path)[0]

    def digest_and_signature(self, path: Path) -> tuple[str, Signature]:
        """The digest, and the signature of exactly the file that has it."""
        name = str(path)
        self.steps += 1
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # opening a FIFO would wait for its writer
            raise SourceError(f"{path} is not a regular file", hint="put a regular file there")

        if (before := self._before.pop(name, None)) is not None:
            self._entries.setdefault(name, _Entry(before.signature, sys.intern(before.digest)))
        entry = self._entries.get(name)
        if entry is not None and entry.signature == signature_of(info):
            return entry.digest, entry.signature

        for _ in range(_ATTEMPTS):
            with open_regular(path) as stream:
                info = os.fstat(stream.fileno())
                signature = signature_of(info)
                lasting = settled(info)
                digest = self._sha256(stream)
                after = signature_of(os.fstat(stream.fileno()))

            self.hashed_files += 1
            if signature == after:
                if lasting:
                    self._entries[name] = _Entry(signature, digest)
                    self._dirty = True
                return digest, signature

        raise SourceUnsettled(
            f"{path} is being written to", hint="it is read again when it no longer changes"
        )

    def let_settle(self, path: Path) -> None:
        """Wait until a file that just changed is settled, at most 6 s.

        There is nothing to do if its digest is remembered.

        A large file is then read once instead of twice, and nobody is given a signature that
        another content may share. Errors: OSError.
        """
        info = path.stat()
        entry = self._entries.get(str(path))
        if entry is None or entry.signature != signature_of(info):
            time.sleep(_unsettled_ns(info) / 1e9)
            self.steps += 1

    def _sha256(self, stream: BufferedReader) -> str:
        digest = hashlib.sha256()
        piece = memoryview(bytearray(_PIECE_BYTES))
        reading = Reading(path=str(stream.name), total_bytes=os.fstat(stream.fileno()).st_size)
        self.reading = reading

        try:
            while size := stream.readinto(piece):
                digest.update(piece[:size])
                reading.done_bytes += size
                self.steps += 1
        finally:
            self.reading = None

        return sys.intern(digest.hexdigest())

    def trust(self, path: Path, info: os.stat_result, digest: str) -> None:
        """Remember a digest that the caller computed from the very file that `info` is of."""
        if settled(info):
            self._entries[str(path)] = _Entry(signature_of(info), digest)
            self._dirty = True

    def forget(self, path: Path) -> None:
        """Forget this file's digest, so that the file is read again the next time."""
        self._before.pop(str(path), None)
        self._entries.pop(str(path), None)
        self._dirty = True

    def save(self) -> None:
        """Write the memory of the files that were asked for since the start, if it changed.

        Errors: OSError.
        """
        if not self._dirty or self._file is None:
            return

        kept = _Kept(_VERSION, self._entries)
        kept = msgspec.structs.replace(kept, mac=self._code(kept))
        temporary = self._file.with_name(f"{self._file.name}.tmp")
        try:
            temporary.unlink(missing_ok=True)  # a link there would lead elsewhere
            disk.write_new(temporary, msgspec.json.encode(kept))
            temporary.replace(self._file)
        finally:  # on a full disk, half a file would take the rest of the space
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

        self._dirty = False

    def _code(self, kept: _Kept) -> str:
        if self._sign is None:
            return kept.mac
        return self._sign(msgspec.json.encode(msgspec.structs.replace(kept, mac="")))
