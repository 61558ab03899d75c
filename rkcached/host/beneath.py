"""Walks and removes what lies beneath a folder, without ever leaving it.

No step follows a symbolic link, and no folder on another mount is entered: every name is resolved
from the descriptor of the folder that holds it, so a folder that becomes a link in between is an
error instead of a way out. The top folder itself may be a link, because somebody named it.
Blocking.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

MAX_DEPTH = 64
"""Folders within folders; each of them holds a descriptor while it is walked."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Identity(NamedTuple):
    """One file or folder, whatever its name is."""

    device: int
    inode: int
    kind: int

    @classmethod
    def of(cls, info: os.stat_result) -> Identity:
        return cls(info.st_dev, info.st_ino, stat.S_IFMT(info.st_mode))


class Entry(NamedTuple):
    """A file or folder as the walk met it: `name` in the folder whose descriptor is `parent`."""

    parent: int
    name: str
    info: os.stat_result

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.info.st_mode)


@contextlib.contextmanager
def opened(top: Path, folders: Sequence[str] = ()) -> Iterator[int]:
    """The descriptor of a folder beneath `top`.

    Errors: OSError; NotADirectoryError where a link is in the way.
    """
    fd = os.open(top, _FOLDER)
    try:
        for name in folders:
            inner = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def identity(top: Path, *names: str) -> Identity | None:
    """Identify what is there now, without following a link; None if nothing is.

    Errors: OSError.
    """
    *folders, name = names
    try:
        with opened(top, folders) as fd:
            return Identity.of(os.stat(name, dir_fd=fd, follow_symlinks=False))
    except FileNotFoundError:
        return None


def is_folder(path: Path) -> bool:
    """Whether it is a folder itself; a link to one is none."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def is_folder_in(parent: int, name: str) -> bool:
    """Whether `name` in the folder `parent` is a folder itself. Errors: OSError."""
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


def names_in(top: Path, *folders: str) -> list[str]:
    """The names in a folder, sorted; none if it is not there, or no folder. Errors: OSError."""
    try:
        with opened(top, folders) as fd:
            return sorted(os.listdir(fd))  # noqa: PTH208 - from a descriptor
    except (FileNotFoundError, NotADirectoryError):
        return []


def walk(parent: int, name: str, depth: int = 0) -> Iterator[Entry]:
    """The file or folder, after all that is in it. Errors: OSError."""
    info = os.stat(name, dir_fd=parent, follow_symlinks=False)

    if stat.S_ISDIR(info.st_mode):
        if depth >= MAX_DEPTH:
            raise OSError(errno.ELOOP, f"its folders are nested more than {MAX_DEPTH} deep", name)
        fd = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)
        try:
            if _mount_of(fd) == _mount_of(parent):
                for inner in sorted(os.listdir(fd)):  # noqa: PTH208 - from a descriptor
                    yield from walk(fd, inner, depth + 1)
        finally:
            os.close(fd)

    yield Entry(parent, name, info)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; nothing is followed."""
    size_bytes = 0
    with contextlib.suppress(OSError), opened(path.parent) as parent:
        for entry in walk(parent, path.name):
            size_bytes += 0 if entry.is_folder else entry.info.st_size
    return size_bytes


def remove(
    top: Path,
    *names: str,
    only: Identity | None = None,
    spare: Callable[[os.stat_result], bool] = lambda _: False,
) -> bool:
    """Remove what `names` lead to from `top`, with all that is in it; returns whether it is gone.

    Nothing happens if it is no longer the one that was seen (`only`). What `spare` accepts stays,
    and so do the folders that hold it, and what another mount holds. Nothing outside of `top` is
    removed, and nothing that has another name; but a file that takes this name between the check
    and the removal is removed, too. Errors: OSError; what was removed until then is gone.
    """
    *folders, name = names
    try:
        with opened(top, folders) as parent:
            now = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if only is not None and Identity.of(now) != only:
                return False

            stays = False
            for entry in walk(parent, name):
                stays |= not _removed(entry, spare)
            return not stays
    except FileNotFoundError:
        return True


def _removed(entry: Entry, spare: Callable[[os.stat_result], bool]) -> bool:
    """Remove an entry, and return whether it is gone.

    Errors: OSError; none for a folder that is not empty, or that something is mounted on.
    """
    if not entry.is_folder:
        if spare(entry.info):
            return False
        with contextlib.suppress(FileNotFoundError):
            os.unlink(entry.name, dir_fd=entry.parent)
        return True

    try:
        os.rmdir(entry.name, dir_fd=entry.parent)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            return False
        raise

    return True


def _mount_of(fd: int) -> str:
    """The kernel's number of the mount that a folder is on, else its device.

    Bind mounts have a number of their own as well.
    """
    try:
        for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
            if line.startswith("mnt_id:"):
                return line
    except OSError:  # /proc is not mounted
        pass

    return str(os.fstat(fd).st_dev)
