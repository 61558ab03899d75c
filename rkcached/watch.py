"""Turns file system events into "look again". Carries no decision: the next scan finds out.

The names that events have are passed on, and say where to look first; nothing depends on them.

Watches folders, not files, because editors replace files; of each path it watches every folder in which a link on the
way lies, so that a retargeted link or a swapped `..data` folder is noticed; and each folder on the way for being moved
or deleted itself. A folder that does not exist yet is awaited in its nearest existing ancestor. Events may be lost
(network file systems have none), so the reconciler also looks again every minute, and every second or so while a
folder cannot be watched at all. The kernel says when it lost events of its own: that is an event like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog
from inotify_simple import INotify, flags, parse_events

log = structlog.get_logger()

_ITSELF = flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR | flags.MASK_ADD
_CONTENT = (
    # Without the events of opening and reading, or the scan's own reads would be events.
    _ITSELF
    | flags.CREATE
    | flags.MODIFY
    | flags.CLOSE_WRITE
    | flags.ATTRIB
    | flags.MOVED_FROM
    | flags.MOVED_TO
    | flags.DELETE
)

_MAX_LINKS = 40
"""As the kernel's own limit for links on one path."""

_READ_BYTES = 1 << 14
"""Events taken in one turn of the event loop, some hundreds: a burst of them does not hold up the others."""

_ANY = "any"
"""Stands for a file of a folder, whatever its name."""


@dataclass(frozen=True, slots=True)
class Place:
    """What matters of a folder."""

    names: set[str] | None
    """None: everything in it; empty: only the folder itself."""
    identity: tuple[int, int] | None
    """Device and inode, to tell a folder from the one that replaces it. None: it is not there."""

    @property
    def events(self) -> int:
        return int(_ITSELF if self.names is not None and not self.names else _CONTENT)


class Follower(Protocol):
    """What the reconciler needs of a watcher."""

    polling: bool
    """Something is not watched: look again often."""

    def follow(self, wanted: Mapping[str, Place]) -> None: ...


class Watcher:
    """Calls `look_again` in the event loop whenever something that is followed may have changed.

    It is given the paths that are known to have: none, if no more is known than that something did.
    """

    def __init__(self, look_again: Callable[[Collection[str]], None]) -> None:
        self._look_again = look_again
        self._inotify: INotify | None = None
        self._closed = False
        self._wanted: Mapping[str, Place] = {}
        self._watches: dict[str, tuple[int, Place]] = {}
        """Of each watched folder: watch descriptor, and what was wanted of it then."""
        self.polling = False

    def close(self) -> None:
        """Stop watching; no call of `look_again` after it returned. Idempotent."""
        self._closed = True
        if self._inotify is not None:
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
            self._inotify.close()
            self._inotify = None
        self._watches.clear()

    def follow(self, wanted: Mapping[str, Place]) -> None:
        """Watch exactly these places. What cannot be watched is tried again by the next call."""
        if self._closed:
            return
        self._wanted = wanted
        trouble: OSError | None
        try:
            trouble = self._rearm(self._open())
        except OSError as error:  # out of inotify instances, or of descriptors
            trouble = error
        if trouble is not None and not self.polling:
            log.warning("polling instead of inotify", error=trouble.strerror, hint=_hint(trouble))
        elif trouble is None and self.polling:
            log.info("inotify instead of polling")
        self.polling = trouble is not None

    def _open(self) -> INotify:
        if self._inotify is None:
            self._inotify = INotify(nonblocking=True)
            asyncio.get_running_loop().add_reader(self._inotify.fd, self._read, self._inotify)
        return self._inotify

    def _rearm(self, inotify: INotify) -> OSError | None:
        """Make the watches equal to what is wanted; returns why that is not possible, if so.

        What changed before a folder was watched was perhaps looked at before: another look follows a new watch.
        """
        wanted, trouble, added = self._wanted, None, False
        for folder, (_, before) in list(self._watches.items()):
            now = wanted.get(folder)
            if now is None or (now.identity, now.events) != (before.identity, before.events):
                self._drop(folder, inotify)
        for folder, place in wanted.items():
            if place.identity is None or folder in self._watches:
                continue
            try:
                watch = inotify.add_watch(folder, place.events)
            except (FileNotFoundError, NotADirectoryError):
                added = True  # it went after it was looked at
            except OSError as error:
                if error.errno != errno.EACCES or place.events == _CONTENT:  # that a way is moved, a rescan may tell
                    trouble = error
            else:
                # Its identity is of before: had it been replaced in between, the next look would see that.
                self._watches[folder] = (watch, place)
                added = True
        if added:
            self._look_again(())
        return trouble

    def _drop(self, folder: str, inotify: INotify) -> None:
        watch, _ = self._watches.pop(folder)
        if not any(other == watch for other, _ in self._watches.values()):  # the same folder, mounted at two places
            with contextlib.suppress(OSError):  # the folder is gone, and its watch with it
                inotify.rm_watch(watch)

    def _read(self, inotify: INotify) -> None:
        try:
            events = parse_events(os.read(inotify.fd, _READ_BYTES))
        except BlockingIOError:
            return
        folders = defaultdict(list)
        for folder, (watch, _) in self._watches.items():
            folders[watch].append(folder)
        matters, changed = False, set()
        for watch, mask, _, name in events:
            if mask & flags.Q_OVERFLOW:
                log.warning("file events lost", hint="there were too many at once; everything is looked at")
                matters = True
            for folder in folders[watch]:
                if mask & flags.IGNORED:  # the watch has ended with its folder
                    self._watches.pop(folder, None)
                names = self._wanted[folder].names
                if name and (names is None or name in names):
                    changed.add(os.path.join(folder, name))  # noqa: PTH118 - strings, as the scan has them
                matters = matters or not name
        if matters or changed:
            self._look_again(changed)


def places(files: Iterable[Path], folders: Iterable[Path]) -> dict[str, Place]:
    """Where these files and the content of these folders may change; they need not exist. Reads links: may block."""
    found: dict[str, set[str] | None] = {}

    def add(folder: str, name: str) -> None:
        if (names := found.setdefault(folder, set())) is not None and name:
            names.add(name)

    by_folder: dict[Path, list[str]] = defaultdict(list)
    for path in files:
        by_folder[path.parent].append(path.name)
    everything = set(folders)
    for parent in by_folder.keys() | everything:
        *way, (folder, last) = trail(parent / _ANY)
        for place in way:
            add(*place)
        add(folder, last)
        if last != _ANY:  # the folder does not exist
            continue
        if parent in everything:
            found[folder] = None
        for name in by_folder.get(parent, ()):
            linked = os.path.islink(os.path.join(folder, name))  # noqa: PTH114, PTH118 - strings, as events carry them
            for place in trail(parent / name) if linked else [(folder, name)]:
                add(*place)
    return {folder: Place(names, _identity(folder)) for folder, names in found.items()}


def trail(path: Path) -> list[tuple[str, str]]:
    """The places (folder, name) whose change may change what `path` is, ending with the file's real folder.

    Every link on the way is a place; so is each folder, without a name. If something on the way does not exist, the
    last place is where it would appear.
    """
    places: list[tuple[str, str]] = []
    folder, rest = "/", [part for part in Path(os.path.abspath(path)).parts if part != "/"]  # noqa: PTH100 - lexical
    links = 0
    while rest:
        name, rest = rest[0], rest[1:]
        here = os.path.join(folder, name)  # noqa: PTH118 - strings, as events carry them
        if os.path.islink(here) and links < _MAX_LINKS:  # noqa: PTH114
            links += 1
            places.append((folder, name))
            target = os.path.normpath(os.path.join(folder, os.readlink(here)))  # noqa: PTH115, PTH118
            folder, rest = "/", [part for part in target.split("/") if part] + rest
        elif rest and os.path.isdir(here):  # noqa: PTH112
            folder = here
            places.append((folder, ""))
        else:
            places.append((folder, name))
            break
    return places


def _identity(folder: str) -> tuple[int, int] | None:
    try:
        info = os.stat(folder)  # noqa: PTH116
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _hint(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC:
            return "raise fs.inotify.max_user_watches"
        case errno.EMFILE:
            return "raise fs.inotify.max_user_instances"
        case _:
            return "let the daemon's user read the folders"
