"""Writes files that survive a power cut; measures free space, and explains a disk's refusals.

A file is written under another name, synced and renamed, then its folder is synced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

FILE_MODE = 0o640

ROOM = "make room there; the daemon then retries automatically"

KEPT_FREE = 0.05
"""This share of a disk is not taken by what can be made again: retired prompt caches, and saved
conversations."""

BLOCK_BYTES = 4096
"""File systems give room in such pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Free:
    """Space that a user without privileges may still take.

    A file system that counts no inodes has `inodes` None.
    """

    mount: Path
    size_bytes: int
    free_bytes: int
    inodes: int | None


def free(place: Path) -> Free:
    """The space of the disk that `place` is on, or will be on once it is made. Errors: OSError."""
    while not place.exists() and place != place.parent:
        place = place.parent

    mount = place
    while not mount.is_mount():
        mount = mount.parent

    figures = os.statvfs(place)
    return Free(
        mount=mount,
        size_bytes=figures.f_blocks * figures.f_frsize,
        free_bytes=figures.f_bavail * figures.f_frsize,
        inodes=figures.f_favail if figures.f_files else None,
    )


def spare_bytes(place: Path) -> int | None:
    """The free bytes of the disk beyond the share that is left free (`KEPT_FREE`).

    Below 0 if it has less. None: not known.
    """
    try:
        space = free(place)
    except OSError:
        return None
    return space.free_bytes - int(space.size_bytes * KEPT_FREE)


def free_bytes(place: Path) -> int | None:
    """The free bytes of `free`; None where the file system does not give them."""
    try:
        return free(place).free_bytes
    except OSError:
        return None


def refusal(error: OSError, place: Path) -> tuple[str, str]:
    """Explain why `place` cannot be written, and what to do about it."""
    why = error.strerror or str(error)
    try:
        disk = free(place)
    except OSError:
        return why, "check the directory's permissions"

    match error.errno:
        case errno.ENOSPC if disk.inodes == 0:
            return no_inodes(disk)
        case errno.ENOSPC:
            reason = (
                f"no space left: {disk.free_bytes:,} of {disk.size_bytes:,} bytes are free on "
                f"{disk.mount}"
            )
            return reason, ROOM
        case errno.EDQUOT:
            return (
                f"{why}: {disk.free_bytes:,} bytes are free on {disk.mount}",
                "raise the quota of the daemon's user",
            )
        case errno.EROFS:
            return (
                f"{disk.mount} is mounted read-only",
                f"mount -o remount,rw {disk.mount}; `journalctl -k` may say why",
            )
        case errno.EIO:
            return why, f"the disk of {disk.mount} may be failing: see `journalctl -k`"
        case _:
            return why, "check the directory's permissions"


def no_inodes(disk: Free) -> tuple[str, str]:
    """The disk takes no more files, however small."""
    return (
        f"no inodes are left on {disk.mount}, though {disk.free_bytes:,} bytes are free",
        f"delete files there: `df -i {disk.mount}`; the daemon then retries automatically",
    )


def write_new(
    path: Path, data: bytes, mode: int = FILE_MODE, *, owner: tuple[int, int] | None = None
) -> None:
    """A new file with this content, on the disk. Errors: OSError, also when it exists.

    `owner`: the uid and gid whose it becomes, if it is not to be ours.
    """
    with path.open("xb") as stream:
        os.fchmod(stream.fileno(), mode)
        if owner is not None:
            os.fchown(stream.fileno(), *owner)
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def replace(
    path: Path, data: bytes, mode: int = FILE_MODE, *, owner: tuple[int, int] | None = None
) -> None:
    """The file has this content afterwards, or on any error the content that it had.

    `owner`: as for `write_new`. Errors: OSError, which names this file.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
    try:
        write_new(temporary, data, mode, owner=owner)
        temporary.replace(path)
    except OSError as error:  # nobody knows the temporary file
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

    sync_directory(path.parent)


def sync_directory(folder: Path) -> None:
    """Sync what was renamed or removed in a folder. Errors: OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
