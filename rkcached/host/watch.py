"""Turns file system events into "look again". Carries no decision: the next scan finds out.

The names that events have are passed on as hints where to look first; nothing depends on them.

`trails` finds the folders to watch, and watchdog watches them. Its `InotifyFD` reads one inotify
descriptor in one thread, whatever the number of folders; when the kernel drops events, it sends one
for that, too. Where the kernel has no room for a watch, and on file systems that other machines
change, its polling observer looks at the same places. Its threads only post to the event loop.
Whatever all of them miss is found when the reconciler looks again, once a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from watchdog.observers.inotify_c import (
    CallbackId,
    InotifyConstants,
    InotifyEvent,
    InotifyFD,
    Mask,
    WatchCallback,
    WatchDescriptor,
)

from rkcached.host.logs import log
from rkcached.host.poll import Poller
from rkcached.host.trails import Place

_ITSELF = Mask(
    InotifyConstants.IN_DELETE_SELF
    | InotifyConstants.IN_MOVE_SELF
    | InotifyConstants.IN_ONLYDIR
    | InotifyConstants.IN_MASK_ADD
)
_CONTENT = Mask(
    # Without the events of opening and reading, or the scan's own reads would be events.
    _ITSELF
    | InotifyConstants.IN_CREATE
    | InotifyConstants.IN_MODIFY
    | InotifyConstants.IN_CLOSE_WRITE
    | InotifyConstants.IN_ATTRIB
    | InotifyConstants.IN_MOVED_FROM
    | InotifyConstants.IN_MOVED_TO
    | InotifyConstants.IN_DELETE
)

POLL_S = 1.0
"""The interval between two polls of what the kernel has no room to watch."""

REMOTE_POLL_S = 5.0
"""The same for remote file systems, where each poll may cost requests to another machine."""

_WRITTEN = Mask(InotifyConstants.IN_MODIFY)
_NOT_WRITTEN = Mask(
    # Whoever wrote to it has closed it, or this is another file.
    InotifyConstants.IN_CLOSE_WRITE
    | InotifyConstants.IN_CREATE
    | InotifyConstants.IN_MOVED_FROM
    | InotifyConstants.IN_MOVED_TO
    | InotifyConstants.IN_DELETE
)

# After so long without a write, a file counts as closed.
_FORGET_S = 60.0

# So many names of changed files are kept for the event loop; more only mean that much changed.
_MAX_NAMES = 1000


@dataclass(frozen=True, slots=True)
class Writing:
    """A file that is open for writing, with the loop's times of its first and last write."""

    first: float
    last: float


class Follower(Protocol):
    """The watcher that the reconciler needs."""

    @property
    def writing(self) -> Mapping[str, Writing]:
        """The files that are open for writing, as far as events show it; polls never do."""
        ...

    def follow(self, wanted: Mapping[str, Place]) -> None: ...


class Watcher:
    """Calls `look_again` in the event loop whenever something that is followed may have changed.

    It is given the paths that have changed for certain; none, if only a change is known, not where.
    """

    def __init__(self, look_again: Callable[[Collection[str]], None]) -> None:
        """Make it in the event loop that it shall call."""
        self._look_again = look_again
        self._listener = _Listener(self._take)
        self._inotify: InotifyFD | None = None
        self._closed = False
        self._ids = itertools.count()
        self._watches: dict[str, _Watch] = {}
        self._unwatched = Poller(self._listener.polled, POLL_S)
        self._remote = Poller(self._listener.polled, REMOTE_POLL_S)
        self.polling = False
        """Whether the kernel has no room to watch everything."""
        self.writing: dict[str, Writing] = {}

    def close(self) -> None:
        """Stop watching: `look_again` is not called after this returned. Idempotent."""
        self._closed = True
        self._watches.clear()
        for poller in (self._unwatched, self._remote):
            poller.poll({})

        if self._inotify is not None:
            self._inotify.stop()
            self._inotify.join()  # it ends at once: nothing that it calls waits for anything
            self._inotify = None

    def follow(self, wanted: Mapping[str, Place]) -> None:
        """Watch exactly these places.

        What cannot be watched is polled, and the next call retries to watch it.
        """
        if self._closed:
            return

        with self._listener.lock:
            self._listener.wanted = wanted
            trouble, unwatched = self._rearm(wanted)

        self._unwatched.poll({folder: place.names for folder, place in unwatched.items()})
        self._remote.poll({folder: place.names for folder, place in wanted.items() if place.remote})

        if trouble is not None and not self.polling:
            log.warning("polling instead of inotify", error=trouble.strerror, hint=_hint(trouble))
        elif trouble is None and self.polling:
            log.info("inotify instead of polling")

        self.polling = trouble is not None

    def _rearm(self, wanted: Mapping[str, Place]) -> tuple[OSError | None, Mapping[str, Place]]:
        """Make the watches equal to what is wanted.

        Returns why that is not possible, and for which places.

        A folder may have changed after the last look and before its watch began: so another look
        follows a new watch.
        """
        try:
            inotify = self._open()
        except OSError as error:  # out of inotify instances, or of descriptors
            return error, wanted

        for folder, watch in list(self._watches.items()):
            if not watch.suits(wanted.get(folder)):
                del self._watches[folder]
                self._listener.forget(folder, watch.number)
                inotify.remove_callbacks([(watch.number, watch.id)])

        trouble = None
        added = False
        unwatched: dict[str, Place] = {}

        for folder, place in wanted.items():
            if place.identity is None or folder in self._watches:
                continue
            try:
                self._watches[folder] = self._add(inotify, folder, place)
                added = True
            except (FileNotFoundError, NotADirectoryError):
                added = True  # it went after it was looked at
            except OSError as error:
                if isinstance(error, PermissionError) and place.is_only_itself:
                    continue  # the next look finds out that a folder on the way was moved
                trouble = error
                unwatched[folder] = place

        if added:
            self._look_again(())
        return trouble, unwatched

    def _open(self) -> InotifyFD:
        if self._inotify is None:
            # It needs three descriptors, and would leak the first where there is none for the
            # others.
            with contextlib.ExitStack() as spare:
                for _ in range(3):
                    spare.enter_context(open(os.devnull, "rb"))  # noqa: PTH123 - quick

            # Not get_instance(): that one is the whole process's, and nobody closes it.
            self._inotify = InotifyFD()
            self._inotify.start()

        return self._inotify

    def _add(self, inotify: InotifyFD, folder: str, place: Place) -> _Watch:
        """Watch a folder.

        The folder may have been replaced since its place was read: the next look sees that.
        """
        callback = CallbackId(next(self._ids))
        mask = _ITSELF if place.is_only_itself else _CONTENT
        number = inotify.add_callback(os.fsencode(folder), mask, self._listener, callback)
        if number < 0:  # watchdog passes over a missing permission
            inotify.remove_callbacks([(number, callback)])
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)

        self._listener.folders[number].add(folder)
        return _Watch(number, callback, place)

    def _take(self, news: _News) -> None:
        """Handle an event in the event loop."""
        if self._closed:
            return

        if news.lost:
            log.warning(
                "file events lost", hint="there were too many at once; every file is checked now"
            )

        for folder, watch in list(self._watches.items()):
            if watch.number in news.ended:
                del self._watches[folder]

        self._note_writing(news)
        self._look_again(news.changed)

    def _note_writing(self, news: _News) -> None:
        now = asyncio.get_running_loop().time()
        if news.lost:
            self.writing.clear()

        for path, is_open in news.writing.items():
            before = self.writing.pop(path, None)
            if not is_open:
                continue

            if before is None:
                self.writing[path] = Writing(now, now)
            else:
                self.writing[path] = Writing(before.first, now)

        for path, writing in list(self.writing.items()):
            if writing.last < now - _FORGET_S:
                del self.writing[path]


@dataclass(frozen=True, slots=True)
class _Watch:
    number: WatchDescriptor
    id: CallbackId
    place: Place
    """The place that the watch was made for."""

    def suits(self, place: Place | None) -> bool:
        """Whether it watches the folder of this place, for the events that matter there."""
        if place is None or place.identity != self.place.identity:
            return False
        return place.is_only_itself == self.place.is_only_itself


@dataclass(slots=True)
class _News:
    """Something that matters happened; the fields hold what more is known."""

    changed: set[str] = field(default_factory=set)
    ended: set[WatchDescriptor] = field(default_factory=set)
    """Watches that ended with their folders."""
    writing: dict[str, bool] = field(default_factory=dict)
    """The files that were written to or closed, and whether they are open for writing now."""
    lost: bool = False
    """Whether the kernel dropped events, because there were more than it keeps."""


class _Listener(WatchCallback):
    """Receives the calls of watchdog's threads.

    It keeps what matters until the event loop takes it, in batches.
    """

    def __init__(self, take: Callable[[_News], None]) -> None:
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._news: _News | None = None
        self.lock = threading.Lock()
        """Guards all that is here: whoever makes watches holds it until they are in `folders`."""
        self.wanted: Mapping[str, Place] = {}
        self.folders: dict[WatchDescriptor, set[str]] = defaultdict(set)
        """The folders of each watch: two if one folder is mounted at two places."""

    def forget(self, folder: str, watch: WatchDescriptor) -> None:
        """Note that this watch is no longer for this folder. The lock is held."""
        folders = self.folders.get(watch, set())
        folders.discard(folder)
        if not folders:
            self.folders.pop(watch, None)

    def on_event(self, event: InotifyEvent) -> None:
        name = os.fsdecode(event.name)
        with self.lock:
            for folder in self.folders.get(event.wd, ()):
                if not name:
                    self._collect()
                elif (place := self.wanted.get(folder)) is not None and place.follows(name):
                    path = os.path.join(folder, name)  # noqa: PTH118 - strings, as the scan's
                    self._changed(path, event.mask)

    def on_watch_deleted(self, wd: WatchDescriptor) -> None:
        with self.lock:
            if self.folders.pop(wd, None) is not None:
                self._collect().ended.add(wd)

    def on_queue_overflow(self) -> None:
        """Called once, not for each folder, because all of them share this one callback."""
        with self.lock:
            self._collect().lost = True

    def polled(self, path: str) -> None:
        """Take a path that a poll found changed, made or gone."""
        folder, name = os.path.split(path)
        with self.lock:
            place = self.wanted.get(folder)
            if place is not None and place.follows(name):
                self._changed(path)
            elif path in self.wanted:
                self._collect()

    def _changed(self, path: str, events: int = 0) -> None:
        news = self._collect()
        if len(news.changed) < _MAX_NAMES:
            news.changed.add(path)

        if events & _WRITTEN and len(news.writing) < _MAX_NAMES:
            news.writing[path] = True
        elif events & _NOT_WRITTEN:
            news.writing[path] = False

    def _collect(self) -> _News:
        """The news that the event loop takes next, to be added to. The lock is held."""
        if self._news is None:
            self._news = _News()
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._deliver)
        return self._news

    def _deliver(self) -> None:
        with self.lock:
            news = self._news
            self._news = None

        if news is not None:
            self._take(news)


def _hint(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC:
            return "raise fs.inotify.max_user_watches"
        case errno.EMFILE:
            return "raise fs.inotify.max_user_instances"
        case _:
            return "let the daemon's user read the folders"
