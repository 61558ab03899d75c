"""The one writer of a store: it holds the store's lock, and each write goes through it.

The lock is on a file in the folder, which may be deleted or replaced while a daemon runs; so each
write makes sure first that the lock is still the one of this folder, and of this file system.
Nothing is written through a link, and what the manifest names is not removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from rkcached.errors import StoreError, StoreLocked
from rkcached.host import beneath, disk
from rkcached.store import marks

DIRECTORY_MODE = 0o750

_LOCK_FLAGS = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class Writer:
    """The right to write to a store. Without `open`, each attempt is refused."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.is_open = False
        self.folders = threading.RLock()
        """Held where a folder of a model or of a retired artifact comes or goes."""
        self.spared: frozenset[Path] = frozenset()
        """Files in the store's place that the manifest names: they stay, whatever their name is."""
        self._lock_fd = -1
        # Of the file system that the store is on while it is open.
        self._device = -1
        self._taking = threading.Lock()

    def open(self) -> None:
        """Create the directory or take one that is a store, and lock it.

        Errors: as for `Store.open`.
        """
        self._take()
        self.is_open = True

    def close(self) -> None:
        """Release the lock. Idempotent."""
        self.is_open = False
        self._release()

    def spare(self, files: Iterable[Path | str]) -> None:
        """From now on, none of these is removed, nor written to.

        Absolute paths; the whole list each time.
        """
        tops = tuple({f"{self.root}{os.sep}", f"{os.path.realpath(self.root)}{os.sep}"})
        inside = {str(path) for path in files if str(path).startswith(tops)}
        self.spared = frozenset(
            self.root / path.removeprefix(top) for path in inside for top in tops
        )

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Only the lock's owner writes, and a refusal of the file system becomes a StoreError."""
        if not self.is_open:
            raise StoreError(f"the store {self.root} is not open for writing")
        with self._taking:
            self.check_device()
            # The directory was deleted or replaced under us: start anew in what is there.
            if not self._has_lock_file():
                self._take()

        try:
            yield
        except OSError as error:
            why, hint = disk.refusal(error, path)
            raise StoreError(f"{path} cannot be written: {why}", hint=hint) from error

    def unlink(self, *names: str) -> None:
        """Remove a file, or a link itself.

        Folders stay, and what the manifest names. Errors: OSError.
        """
        *folders, name = names
        if self.root.joinpath(*names) in self.spared:
            return
        with contextlib.suppress(FileNotFoundError), beneath.opened(self.root, folders) as parent:
            if not beneath.is_folder_in(parent, name):
                os.unlink(name, dir_fd=parent)

    def check_device(self) -> None:
        """Errors: StoreError where another file system, without a store, is in the store's place.

        Some have another device number after each mount, so a store that is there is taken.
        """
        if not self.is_open:
            return

        with contextlib.suppress(FileNotFoundError):
            if self.root.stat().st_dev != self._device and marks.why_no_store(self.root):
                raise StoreError(
                    f"{self.root} is on another file system than when the store was opened",
                    hint="mount it again; to begin a new store there, restart the daemon",
                )

    def _take(self) -> None:
        """Create and lock the directory.

        The descriptor only reads, so that its disk can be remounted read-only.
        """
        try:
            self.root.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            _check_ours(self.root)

            # Of the folder: on an overlay, its files have other numbers.
            device = self.root.stat().st_dev
            fd = os.open(self.root / marks.LOCK, _LOCK_FLAGS, disk.FILE_MODE)
        except OSError as error:
            raise _unusable(self.root, error) from error

        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
            os.close(fd)
            raise StoreLocked(
                f"the cache directory {self.root} belongs to another daemon "
                f"(pid {owner or 'unknown'})",
                hint="stop that daemon, or use another cache directory",
            ) from error

        self._release()
        self._lock_fd = fd
        self._device = device

        # The refusal of another daemon names the owner. A full disk may not take that.
        with contextlib.suppress(OSError):
            writing = os.open(
                self.root / marks.LOCK, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            )
            with os.fdopen(writing, "w") as stream:
                stream.write(f"{os.getpid()}\n")

        marks.tag(self.root)

    def _release(self) -> None:
        if self._lock_fd >= 0:
            # A child that is just being forked still has the descriptor.
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _has_lock_file(self) -> bool:
        """Whether the file that we hold the lock on is still the one in the directory."""
        try:
            return os.path.samestat(os.fstat(self._lock_fd), (self.root / marks.LOCK).stat())
        except OSError:
            return False


def check_place(root: Path, *, may_write: bool = True) -> None:
    """Find out whether `open` would take this folder. Makes and changes nothing.

    `may_write` is False where another user will write. Errors: StoreError, as `open` raises it.
    """
    nearest = root
    while not os.path.lexists(nearest):
        nearest = nearest.parent

    try:
        if nearest == root:
            _check_ours(root)
        elif not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

        if may_write:
            _check_writable(nearest)
        if (root / marks.LOCK).is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))  # noqa: TRY301
    except OSError as error:
        raise _unusable(root, error) from error


def _check_writable(folder: Path) -> None:
    """Errors: OSError, as the attempt to write would raise it."""
    if os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        return

    number = errno.EACCES
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        number = errno.EROFS
    raise OSError(number, os.strerror(number))


def _check_ours(root: Path) -> None:
    """Errors: StoreError for the folder of somebody else; OSError."""
    if why := marks.why_not_ours(root):
        hint = "name an empty or a new folder with --cache-dir, "
        hint += "or move what is not the store's out of this one"
        raise StoreError(f"{root} is not taken as a store: {why}", hint=hint)


def _unusable(root: Path, error: OSError) -> StoreError:
    """The error of a folder in which no store can be made or opened."""
    another = "name another folder with --cache-dir or RKCACHED_CACHE_DIR"
    why, hint = disk.refusal(error, root)

    if os.path.islink(root) and not os.path.exists(root):  # noqa: PTH110, PTH114 - never raise
        why = f"it is a link to {root.readlink()}, which does not exist"
        hint = f"make that folder, or {another}"
    elif isinstance(error, FileExistsError | NotADirectoryError):
        in_the_way = next(place for place in (root, *root.parents) if os.path.lexists(place))
        why = f"{in_the_way} is not a folder"
        hint = another
    elif isinstance(error, PermissionError):
        hint = f"create it for this user, or {another}"
    elif error.errno == errno.ELOOP:
        why = f"{marks.LOCK} in it is a link"
        hint = "remove the link"

    return StoreError(f"the cache directory {root} cannot be written: {why}", hint=hint)


def make_folder(path: Path) -> None:
    """Make a folder, unless a link is in its place: writes there would leave the store.

    Errors: OSError; StoreError.
    """
    path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    if not beneath.is_folder(path):
        raise StoreError(
            f"{path} is a link, and the store does not write through links",
            hint="remove the link; to keep a model's caches on another disk, mount it there",
        )
