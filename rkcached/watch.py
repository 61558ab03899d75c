"""Turns file system events into "look again". Carries no decision and no file name: the next scan finds out.

Watches folders, not files, because editors replace files; of each path it watches every folder in which a link on the
way lies, so that a retargeted link or a swapped `..data` folder is noticed; and the folder's own parent, so that a
replaced folder is. A folder that does not exist yet is awaited in its nearest existing ancestor. Events may be lost
(kernel queue, network file systems), so the reconciler also looks again every minute.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import structlog
from watchdog.events import (
    DirAttribEvent,
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver, ObservedWatch
from watchdog.observers.polling import PollingObserver

log = structlog.get_logger()

_EVENTS: list[type[FileSystemEvent]] = [
    # Without the events of opening and reading, or the scan's own reads would be events.
    FileCreatedEvent, FileModifiedEvent, FileClosedEvent, FileMovedEvent, FileDeletedEvent, FileAttribEvent,
    DirCreatedEvent, DirMovedEvent, DirDeletedEvent, DirAttribEvent,
]  # fmt: skip

_MAX_LINKS = 40
"""As the kernel's own limit for links on one path."""

_POLL_INTERVAL_S = 1.0

Wanted = dict[str, set[str] | None]
"""Folder to the names in it that matter; None: all of them."""


class Follower(Protocol):
    """What the reconciler needs of a watcher."""

    def follow(self, files: Iterable[Path], folders: Iterable[Path]) -> None: ...


class Watcher(FileSystemEventHandler):
    """Calls `look_again` from a thread of its own whenever something that is followed may have changed."""

    def __init__(self, look_again: Callable[[], None]) -> None:
        self._look_again = look_again
        self._observer: BaseObserver = Observer()
        self._watches: dict[str, tuple[ObservedWatch, tuple[int, int]]] = {}
        self._wanted: Wanted = {}
        self._lock = threading.Lock()
        self.polling = False

    def start(self) -> None:
        try:
            self._observer.start()
        except OSError as error:  # out of inotify instances
            self._poll_instead(error)

    def close(self) -> None:
        """Stop watching; no call of `look_again` after it returned. Idempotent."""
        if self._observer.is_alive():
            self._observer.stop()
            self._observer.join()

    def follow(self, files: Iterable[Path], folders: Iterable[Path]) -> None:
        """Watch exactly these files and the content of these folders; they need not exist. Cheap without a change."""
        wanted: Wanted = {}
        for path in files:
            for folder, name in trail(path):
                names = wanted.setdefault(folder, set())
                if names is not None:
                    names.add(name)
        for path in folders:
            for folder, name in trail(path / "any"):
                if name == "any":
                    wanted[folder] = None
                elif (names := wanted.setdefault(folder, set())) is not None:
                    names.add(name)
        with self._lock:
            self._wanted = wanted
        self._rearm(wanted)

    def dispatch(self, event: FileSystemEvent) -> None:
        """Called by watchdog in its thread."""
        with self._lock:
            wanted = self._wanted
        for raw in (event.src_path, event.dest_path):
            path = os.fsdecode(raw)
            folder, name = os.path.split(path)
            names = wanted.get(folder, ())
            if path in wanted or names is None or name in names:
                self._look_again()
                return

    def _rearm(self, wanted: Wanted) -> None:
        """Make the watches equal to `wanted`. A folder that was replaced has another inode: watch the new one."""
        identities = {folder: _identity(folder) for folder in wanted}
        for folder, (watch, watched) in list(self._watches.items()):
            if identities.get(folder) != watched:
                del self._watches[folder]
                self._observer.unschedule(watch)
        for folder, identity in identities.items():
            if identity is None or folder in self._watches:
                continue
            try:
                watch = self._observer.schedule(self, folder, event_filter=_EVENTS)
            except FileNotFoundError:
                continue  # gone in between: its parent's event, or the next rescan, tells
            except OSError as error:
                if self.polling:
                    log.warning("folder not watched", folder=folder, error=str(error))
                    continue
                self._poll_instead(error)
                return self._rearm(wanted)
            self._watches[folder] = (watch, identity)
        return None

    def _poll_instead(self, error: OSError) -> None:
        """Out of inotify watches or instances: look at the folders every second."""
        log.warning("polling instead of inotify", error=str(error), hint="raise fs.inotify.max_user_watches")
        self.close()
        self.polling = True
        self._watches.clear()
        self._observer = PollingObserver(timeout=_POLL_INTERVAL_S)
        self._observer.start()


def trail(path: Path) -> list[tuple[str, str]]:
    """The places (folder, name) whose change may change what `path` is, ending with the file's real folder.

    Every link on the way is a place; so is the file's folder in its parent. If something on the way does not exist,
    the last place is where it would appear.
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
            if len(rest) == 1:
                places.append((folder, name))
            folder = here
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
