"""Shows that a record was written by this installation, and not by whoever can write to the store.

Sidecars, records of conversations and the file of digests have a message authentication code (HMAC,
RFC 2104, with SHA-256) over all that they say, by a key that lies in the state directory and that
nobody but the daemon's user can read. So a state that was put into the store with a record of its
own making is not served. It protects from nobody who can read that key, or run code as that user.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
from pathlib import Path
from typing import TypeVar

import msgspec

from rkcached.host import disk
from rkcached.host.logs import log
from rkcached.host.regular import read_regular

NAME = "store.key"
KEY_BYTES = 32
KEY_MODE = 0o600


UNSIGNED = (
    "its sidecar has no valid signature of this installation: it was copied, changed, or made by "
    "an earlier version"
)


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """A record that can be signed."""

    mac: str = ""
    """The code of all else that it says."""


Record = TypeVar("Record", bound=Signed)


class Seal:
    def __init__(self, key: bytes) -> None:
        self._key = key

    def signed(self, record: Record) -> Record:
        """The record with the code of what it says."""
        return msgspec.structs.replace(record, mac=self._code(record))

    def has_signed(self, record: Signed) -> bool:
        return hmac.compare_digest(self._code(record).encode(), record.mac.encode())

    def code(self, data: bytes) -> str:
        """The message authentication code of some data."""
        return hmac.new(self._key, data, hashlib.sha256).hexdigest()

    def _code(self, record: Signed) -> str:
        bare = msgspec.structs.replace(record, mac="")
        said = msgspec.json.encode(bare, enc_hook=dict, order="sorted")
        return self.code(type(record).__name__.encode() + b" " + said)


def is_signed(record: Signed, seal: Seal | None) -> bool:
    """Whether it may be believed; without a seal, every one may be."""
    return seal is None or seal.has_signed(record)


def read_seal(state_dir: Path) -> Seal | None:
    """The seal of this installation; None if there is no key, or this user must not read it."""
    path = state_dir / NAME
    with contextlib.suppress(OSError):
        key = read_regular(path, KEY_BYTES, follow=False)
        info = path.lstat()
        # One that somebody else has put there, or can read, protects from nobody.
        is_secret = info.st_uid == state_dir.stat().st_uid and not info.st_mode & 0o077
        if len(key) == KEY_BYTES and is_secret:
            return Seal(key)
    return None


def make_seal(state_dir: Path) -> Seal | None:
    """The seal of this installation; its key is made if there is none.

    None if that cannot be: then sidecars are not signed, and every one is believed.
    """
    if (seal := read_seal(state_dir)) is not None:
        return seal

    key = secrets.token_bytes(KEY_BYTES)
    path = state_dir / NAME
    try:
        state_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        disk.replace(path, key, KEY_MODE)
    except OSError as error:
        log.warning(
            "prompt caches are not signed",
            file=str(path),
            error=error.strerror,
            hint="make the state directory writable for the daemon's user, and restart",
        )
        return None
    return Seal(key)
