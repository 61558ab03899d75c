"""Private folders of workers: made, locked, and removed when they are left behind.

A worker's scratch folder holds its socket and a link for a moment, never a KV state, so it may be
in memory. It is made in the runtime directory (systemd's for the daemon, the user's own otherwise),
which no cleaner of temporary files walks through; where there is none, in the temporary directory.
Each folder is locked (flock(2)) for as long as its daemon or its worker lives. It is swept when it
has our mark and nobody holds the lock: a pid would mean nothing to a daemon in another PID
namespace that shares the directory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

PREFIX = "rkcached-scratch-"

MARK = ".rkcached-scratch"
"""An empty file that marks a folder as ours: another program may use a name like it."""

# A sweeper may take a folder between its making and its locking, but not ten times in a row.
_TRIES = 10


class Scratch:
    """A private folder (mode 0700), locked until `remove`. Errors of the constructor: OSError."""

    def __init__(self) -> None:
        self.path = ""
        self.lock = -1
        """Inherited by the worker, so that the folder stays locked if the daemon is killed before
        it."""
        self._sockets: set[str] = set()

        for _ in range(_TRIES):
            path = tempfile.mkdtemp(prefix=PREFIX, dir=parent())
            lock = _open(path)
            if lock is None:
                continue
            if _is_locked_by_us(lock) and _is_same(path, lock):
                Path(path, MARK).touch(mode=0o600)
                self.path = path
                self.lock = lock
                return
            os.close(lock)
        raise OSError(f"no scratch folder could be made in {parent()}")

    def settle(self) -> None:
        """Remember the sockets that the worker listens on; from now on none of them may vanish.

        Errors: OSError.
        """
        self._sockets = self._find_sockets()

    def is_whole(self) -> bool:
        """Whether the folder and the sockets that it had when it settled are still there."""
        try:
            return _is_same(self.path, self.lock) and self._sockets <= self._find_sockets()
        except OSError:
            return False

    def remove(self) -> None:
        """Take the folder away, if it is still ours, and let go of the lock. Idempotent."""
        if self.lock < 0:
            return
        if _is_same(self.path, self.lock):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)
        self.lock = -1

    def _find_sockets(self) -> set[str]:
        return {file.name for file in Path(self.path).iterdir() if file.is_socket()}


def parent() -> str:
    """The runtime directory, if nobody else may write to it; otherwise the temporary one."""
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        folder = os.environ.get(name, "").split(":")[0]
        if folder and Path(folder).is_absolute() and _is_own(folder):
            return folder
    return tempfile.gettempdir()


def sweep() -> None:
    """Remove the scratch folders that were left behind: with our mark, and not locked."""
    for place in {parent(), tempfile.gettempdir()}:
        for path in Path(place).glob(f"{PREFIX}*"):
            _sweep(path)


def _sweep(path: Path) -> None:
    lock = _open(str(path))
    if lock is None:
        return

    try:
        if _is_marked(lock) and _is_locked_by_us(lock):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def _open(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None


def _is_marked(folder: int) -> bool:
    """Whether this open folder is ours, and a scratch folder."""
    try:
        mark = os.stat(MARK, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    its_owners = {os.fstat(folder).st_uid, mark.st_uid}
    return stat.S_ISREG(mark.st_mode) and mark.st_size == 0 and its_owners == {os.geteuid()}


def _is_locked_by_us(lock: int) -> bool:
    """Take the lock, unless another process holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_same(path: str, lock: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(lock))
    except OSError:
        return False


def _is_own(folder: str) -> bool:
    """Whether only we may write to it. With sudo, XDG_RUNTIME_DIR may still be another user's."""
    try:
        status = Path(folder).stat()
    except OSError:
        return False

    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    return os.access(folder, os.W_OK | os.X_OK)
