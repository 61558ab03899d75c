"""Shows that a sidecar was written by this installation, and not by whoever can write to the store.

A sidecar has a message authentication code (HMAC, RFC 2104, with SHA-256) over all that it says,
by a key that lies in the state directory and that nobody but the daemon's user can read. So a
prompt cache that was put into the store with a sidecar of its own making is not served. It protects
from nobody who can read that key, or run code as that user.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
from pathlib import Path

import msgspec

from rkcached.host import disk
from rkcached.host.logs import log
from rkcached.host.regular import read_regular
from rkcached.store.sidecar import Sidecar

NAME = "store.key"
KEY_BYTES = 32
KEY_MODE = 0o600


UNSIGNED = "its sidecar was not signed by this installation: it was copied here, or changed"


class Seal:
    def __init__(self, key: bytes) -> None:
        self._key = key

    def signed(self, sidecar: Sidecar) -> Sidecar:
        """The sidecar with the code of what it says."""
        return msgspec.structs.replace(sidecar, mac=self._code(sidecar))

    def has_signed(self, sidecar: Sidecar) -> bool:
        return hmac.compare_digest(self._code(sidecar), sidecar.mac)

    def _code(self, sidecar: Sidecar) -> str:
        bare = msgspec.structs.replace(sidecar, mac="")
        said = msgspec.json.encode(bare, enc_hook=dict, order="sorted")
        return hmac.new(self._key, said, hashlib.sha256).hexdigest()


def is_signed(sidecar: Sidecar, seal: Seal | None) -> bool:
    """Whether it may be believed; without a seal, every one may be."""
    return seal is None or seal.has_signed(sidecar)


def read_seal(state_dir: Path) -> Seal | None:
    """The seal of this installation; None if there is no key, or this user must not read it."""
    with contextlib.suppress(OSError):
        key = read_regular(state_dir / NAME, KEY_BYTES, follow=False)
        if len(key) == KEY_BYTES:
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
            hint="whoever can write to the store can have a prompt cache of his own served",
        )
        return None
    return Seal(key)
