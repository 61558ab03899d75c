"""The keys by which programs are let in over TCP: `keys.json` in the state directory.

A key is `rkc_` and 256 random bits. Only its SHA-256 is kept: nobody can guess 256 bits, however
fast the digest is, so one that is slow on purpose, as for passwords, would protect nothing and
cost each request some tenths of a second.

The file belongs to the daemon's user, and nobody else may read or write it. Commands write it; the
daemon only reads it, when it has changed.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import hmac
import os
import pwd
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import msgspec

from rkcached.errors import FormatError, NotPermitted, SourceError, StoreError, UsageError
from rkcached.host import disk, places
from rkcached.host.logs import log
from rkcached.host.regular import read_regular

NAME: Final = "keys.json"
PREFIX: Final = "rkc_"
MAX_KEYS: Final = 1000
FIRST_OWNER: Final = 1 << 33
"""Owners from here on are those of keys. A uid has 32 bits, so it is below."""

_AFTER_LAST_OWNER = 1 << 53
"""From here on JavaScript does not tell two numbers apart."""

_KEY_BYTES = 32
_MODE = 0o600
_MAX_FILE_BYTES = 1 << 20
_LOCK_WAIT_S = 5.0
_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_USER = "rkcached"

_Signature = tuple[int, ...]


class AccessKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key, without the key itself."""

    name: str
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    owner: int
    """Whose the requests with it are. No other key ever has this number, and no user."""
    admin: bool = False
    """It may also make changes, as on the admin socket."""
    models: tuple[str, ...] = ()
    """The only models that it may use; all if there are none."""
    created: str
    """Date and time, in UTC."""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int = 1
    keys: tuple[AccessKey, ...] = ()


class AccessKeys:
    """The keys as the daemon knows them. On the event loop: it takes one stat to see a change."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / NAME
        self._keys: tuple[AccessKey, ...] = ()
        self._signature: _Signature | None = None

    def find(self, presented: Sequence[str]) -> AccessKey | None:
        """The key that is one of these texts. Each is compared with every key."""
        self._refresh()
        digests = [_digest(text) for text in presented]
        found = None
        for key in self._keys:
            for digest in digests:
                if hmac.compare_digest(digest, key.sha256):
                    found = key
        return found

    def _refresh(self) -> None:
        signature = _signature(self._path)
        if signature == self._signature:
            return

        self._signature = signature
        self._keys = ()
        if signature is None:
            return
        try:
            self._keys = _read(self._path).keys
        except (FormatError, OSError) as error:
            log.error(
                "keys rejected",
                file=str(self._path),
                error=_words_of(error),
                hint="every key is rejected; remove the file, and create new keys with "
                "`sudo rkcached key add NAME`",
            )


def list_keys(state_dir: Path) -> tuple[AccessKey, ...]:
    """All keys, the oldest first. Errors: FormatError, NotPermitted, SourceError."""
    path = state_dir / NAME
    try:
        return _read(path).keys
    except FileNotFoundError:
        return ()
    except PermissionError as error:
        raise _not_permitted(path) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {_words_of(error)}") from error


def check_name(name: str) -> None:
    """Errors: UsageError for one that no key can have."""
    if not _KEY_NAME.fullmatch(name):
        raise UsageError(
            f"{name[:100]!r} cannot be the name of a key",
            hint="write 1 to 64 letters, digits, dots, hyphens and underscores, the first one a "
            "letter or a digit",
        )


def add_key(
    state_dir: Path, name: str, *, admin: bool = False, models: Sequence[str] = ()
) -> tuple[AccessKey, str]:
    """Make a key. Returns it, and the text that is nowhere kept.

    Errors: UsageError, FormatError, NotPermitted, SourceError, StoreError.
    """
    check_name(name)
    if admin and models:
        raise UsageError(
            "an admin key cannot be limited to models", hint="leave out --admin or --model"
        )

    text = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(_KEY_BYTES)).rstrip(b"=").decode()
    with _changing(state_dir):
        keys = list_keys(state_dir)
        if any(key.name == name for key in keys):
            raise UsageError(
                f"there is a key named {name!r} already",
                hint=f"choose another name, or remove that key: `rkcached key revoke {name}`",
            )
        if len(keys) >= MAX_KEYS:
            raise UsageError(f"there are {MAX_KEYS:,} keys already", hint="revoke some of them")

        key = AccessKey(
            name=name,
            sha256=_digest(text),
            owner=_new_owner(keys),
            admin=admin,
            models=tuple(dict.fromkeys(models)),
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        _write(state_dir, (*keys, key))
    return key, text


def revoke_key(state_dir: Path, name: str) -> AccessKey:
    """Remove a key. Errors: FormatError, NotPermitted, SourceError, StoreError."""
    with _changing(state_dir):
        keys = list_keys(state_dir)
        key = next((key for key in keys if key.name == name), None)
        if key is None:
            known = ", ".join(key.name for key in keys[:10]) or "none"
            raise SourceError(f"there is no key named {name!r}", hint=f"known: {known}")
        _write(state_dir, tuple(other for other in keys if other is not key))
    return key


def _new_owner(keys: Sequence[AccessKey]) -> int:
    """A number that no key has or had: what a key learned must not become another one's.

    It is drawn, not counted, so that this holds also after the file was removed or restored.
    """
    known = {key.owner for key in keys}
    while True:
        owner = FIRST_OWNER + secrets.randbelow(_AFTER_LAST_OWNER - FIRST_OWNER)
        if owner not in known:
            return owner


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _signature(path: Path) -> _Signature | None:
    """It is another one whenever the file is; None if there is no file to be seen."""
    try:
        info = path.lstat()
    except OSError:
        return None
    return (
        info.st_dev,
        info.st_ino,
        info.st_size,
        info.st_mtime_ns,
        info.st_ctime_ns,
        info.st_mode,
        info.st_uid,
    )


def _read(path: Path) -> _File:
    """Errors: FormatError for a file that is damaged, or that others may have written; OSError."""
    data = read_regular(path, _MAX_FILE_BYTES, follow=False)
    info = path.lstat()
    if info.st_mode & 0o077 or info.st_uid != path.parent.stat().st_uid:
        raise FormatError(
            f"{path} must belong to the daemon's user, and nobody else may read or write it",
            hint="remove it, and create new keys with `sudo rkcached key add NAME`",
        )
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{path} is damaged: {error}",
            hint="remove it, and create new keys with `sudo rkcached key add NAME`",
        ) from error

    if file.version != 1:
        raise FormatError(
            f"{path} has the version {file.version}, which this rkcached does not know",
            hint="install the version of rkcached that wrote it",
        )
    if any(key.owner < FIRST_OWNER or not _KEY_NAME.fullmatch(key.name) for key in file.keys):
        raise FormatError(f"{path} has a key that no command of rkcached created")
    return file


def _write(state_dir: Path, keys: tuple[AccessKey, ...]) -> None:
    """Errors: NotPermitted, StoreError."""
    path = state_dir / NAME
    data = msgspec.json.format(msgspec.json.encode(_File(keys=keys)), indent=1) + b"\n"
    try:
        folder = state_dir.stat()
        owner = (folder.st_uid, folder.st_gid)
        disk.replace(path, data, _MODE, owner=None if os.geteuid() else owner)
    except PermissionError as error:
        raise _not_permitted(path) from error
    except OSError as error:
        why, hint = disk.refusal(error, state_dir)
        raise StoreError(f"{path} cannot be written: {why}", hint=hint) from error


@contextlib.contextmanager
def _changing(state_dir: Path) -> Iterator[None]:
    """Make the state directory if there is none, and let one command at a time change its keys.

    Errors: NotPermitted, StoreError.
    """
    try:
        _make(state_dir)
        fd = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError as error:
        raise _not_permitted(state_dir) from error
    except OSError as error:
        why, hint = disk.refusal(error, state_dir)
        raise StoreError(f"{state_dir} cannot be opened: {why}", hint=hint) from error

    try:
        _lock(fd, state_dir)
        yield
    finally:
        os.close(fd)


def _make(state_dir: Path) -> None:
    """The service's own one, which systemd makes at its first start, is its user's from now on."""
    if state_dir.is_dir():
        return

    state_dir.mkdir(mode=0o750, parents=True, exist_ok=True)  # another command may be first
    if state_dir == places.SYSTEM_STATE:
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(_USER)
            os.chown(state_dir, user.pw_uid, user.pw_gid)


def _lock(fd: int, state_dir: Path) -> None:
    ends = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) or time.monotonic() > ends:
                raise StoreError(
                    f"another program keeps {state_dir} locked", hint="try again in a moment"
                ) from error
            time.sleep(0.05)
        else:
            return


def _not_permitted(path: Path) -> NotPermitted:
    return NotPermitted(
        f"permission denied: {path}",
        hint="keys are made and shown by root and by the daemon's user: use sudo",
    )


def _words_of(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
