"""Polls folders and files where the kernel reports no changes, by watchdog's polling observer.

One thread serves all of them, whatever their number, and never the event loop: a file system may
hang. A finding is only a hint, as events are; the reconciler's next look finds what a poll misses.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from watchdog.events import DirModifiedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers.polling import PollingObserverVFS

Tree = Mapping[str, set[str] | None]
"""Folders, and the names in each that matter. None: all of them."""


class Poller(FileSystemEventHandler):
    """Polls places where the kernel reports nothing, in one thread, whatever their number.

    watchdog is shown the tree of all files with nothing in it but these places and the ways to
    them.
    """

    def __init__(self, found: Callable[[str], None], interval_s: float) -> None:
        """`found` is called in another thread, with each path that changed, came or went."""
        self._found = found
        self._interval_s = interval_s
        self._observer: PollingObserverVFS | None = None
        self._tree: Tree = {}

    def poll(self, places: Tree) -> None:
        """Poll exactly these places from now on.

        Does not block, whatever state their file systems are in.
        """
        if places and self._observer is None:
            # The first snapshot is taken here, of an empty tree; the next one, in watchdog's
            # thread, finds it all new.
            self._observer = PollingObserverVFS(
                _stat, self._entries, polling_interval=self._interval_s
            )
            self._observer.schedule(self, "/", recursive=True)
            self._observer.start()
        elif not places and self._observer is not None:
            # Stopping it waits for a poll that goes on, which may hang with its file system.
            threading.Thread(target=self._observer.stop, daemon=True).start()
            self._observer = None

        self._tree = _tree(places)

    def on_any_event(self, event: FileSystemEvent) -> None:
        # Something in the folder came or went, which is an event of its own.
        if isinstance(event, DirModifiedEvent):
            return

        for path in (event.src_path, event.dest_path):
            if path:
                self._found(os.fsdecode(path))

    def _entries(self, folder: str | None) -> Iterator[os.DirEntry[str]]:
        names = self._tree.get(folder or "/", set())
        if names is not None:
            # watchdog uses only the name of an entry.
            return cast("Iterator[os.DirEntry[str]]", map(_Entry, list(names)))

        try:
            with os.scandir(folder) as entries:
                return iter(list(entries))
        except OSError:
            # A poll shall not fail as a whole. The look that comes next reports the problem.
            return iter(())


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str


def _stat(path: str) -> os.stat_result:
    """lstat, with the time of change as mtime, because programs can set the true one back."""
    info = os.lstat(path)
    return os.stat_result((*info[:8], info.st_mtime_ns + info.st_ctime_ns, info[9]))


def _tree(places: Tree) -> Tree:
    """These places, and the ways to them from the root."""
    tree: dict[str, set[str] | None] = {}

    def add(folder: str, names: Iterable[str]) -> None:
        if (known := tree.setdefault(folder, set())) is not None:
            known.update(names)

    for folder, names in places.items():
        below = folder
        while below != "/":
            above, name = os.path.split(below)
            add(above, [name])
            below = above

        if names is None:
            tree[folder] = None
        else:
            add(folder, names)

    return tree
