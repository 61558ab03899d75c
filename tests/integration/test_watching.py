"""What is promised of watching, whatever library does it.

Few threads, no delay, nothing heard of reading, no leaks.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from pathlib import Path

import pytest

from rkcached.host.poll import Poller
from rkcached.host.trails import places
from rkcached.host.watch import Watcher
from tests.waiting import wait_until

FOLDERS = 40
NOBODY = 65534


class Ear:
    """A watcher, and what it told."""

    def __init__(self) -> None:
        self.times = 0
        self.paths: set[str] = set()
        self._heard = asyncio.Event()
        self.watcher = Watcher(self._hear)

    def _hear(self, changed: Collection[str]) -> None:
        self.times += 1
        self.paths.update(changed)
        self._heard.set()

    async def hear(self, path: Path) -> None:
        """Return when a change of this path was told."""
        async with asyncio.timeout(10):
            while str(path) not in self.paths:
                self._heard.clear()
                await self._heard.wait()


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """How many there are before a test; afterwards they are no more."""
    before = threading.active_count()
    yield before
    wait_until(lambda: threading.active_count() <= before, "the threads ended")


@pytest.fixture
async def ear() -> AsyncIterator[Ear]:
    ear = Ear()
    yield ear
    ear.watcher.close()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """One file in each of many folders."""
    files = [tmp_path / f"folder{number}" / "file" for number in range(FOLDERS)]
    for file in files:
        file.parent.mkdir()
        file.write_text("before")
    return files


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


async def test_one_thread_for_all_folders(ear: Ear, files: list[Path], threads: int) -> None:
    """Whatever is followed, there is one thread more, and each of the files is heard of."""
    ear.watcher.follow(places(files, []))
    assert threading.active_count() == threads + 1
    for file in files:
        file.write_text("after")
        await ear.hear(file)


async def test_a_move_is_told_at_once(ear: Ear, files: list[Path]) -> None:
    """A file that leaves is not held back until it may have arrived elsewhere.

    As watchdog's own observer does.
    """
    ear.watcher.follow(places(files, []))
    took = []
    for file in files[:5]:
        started = time.monotonic()
        file.rename(file.with_name("unknown"))
        await ear.hear(file)
        took.append(time.monotonic() - started)
    assert min(took) < 0.4, "watchdog's observer waits for 0.5 s"


async def test_reading_is_no_event(ear: Ear, files: list[Path]) -> None:
    """A look reads every file that is followed: were that an event, looks would never end."""
    ear.watcher.follow(places(files, [files[0].parent]))
    for file in files:
        assert file.read_text() == "before"
        assert list(file.parent.iterdir()) == [file]
    files[-1].write_text("after")
    await ear.hear(files[-1])
    assert ear.paths == {str(files[-1])}


async def test_nothing_is_left_of_a_watcher(files: list[Path], threads: int) -> None:
    """Closed, it has neither threads nor descriptors, and calls nobody any more."""
    opened = descriptors()
    for _ in range(3):
        ear = Ear()
        ear.watcher.follow(places(files, []))
        files[0].write_text("after")
        ear.watcher.close()
        told = ear.times
        files[0].write_text("later")
        await asyncio.sleep(0)
        assert ear.times == told
    assert (threading.active_count(), descriptors()) == (threads, opened)


async def test_without_descriptors_it_polls_and_leaks_none(ear: Ear, files: list[Path]) -> None:
    """With one left it cannot watch, and takes not even that one.

    With more, the next call ends the polling.
    """
    hoard: list[int] = []
    wanted = places(files, [])
    try:
        while True:
            hoard.append(os.open("/dev/null", os.O_RDONLY))
            if len(hoard) > 100_000:
                pytest.skip("descriptors are not limited here")
    except OSError:
        os.close(hoard.pop())
    try:
        for _ in range(3):
            ear.watcher.follow(wanted)
            assert ear.watcher.polling
        hoard.append(os.open("/dev/null", os.O_RDONLY))
    finally:
        for descriptor in hoard:
            os.close(descriptor)
    ear.watcher.follow(wanted)
    assert not ear.watcher.polling
    files[0].write_text("after")
    await ear.hear(files[0])


async def test_a_folder_that_may_not_be_read(ear: Ear, tmp_path: Path) -> None:
    """Its files are polled, which needs less permission than watching them.

    The daemon says that it polls.
    """
    file = tmp_path / "closed" / "file"
    file.parent.mkdir()
    file.write_text("before")
    file.parent.chmod(0o711)
    wanted = places([file], [])
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    else:
        file.parent.chmod(0o311)
    try:
        ear.watcher.follow(wanted)
        assert ear.watcher.polling
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
    file.write_text("after")
    await ear.hear(file)
    file.parent.chmod(0o755)
    ear.watcher.follow(places([file], []))
    assert not ear.watcher.polling


# Polling, without a watcher

Polled = tuple[Poller, list[str]]


@pytest.fixture
def polled() -> Iterator[Polled]:
    """A poller that is impatient, and the paths that it found."""
    found: list[str] = []
    poller = Poller(found.append, 0.02)
    yield poller, found
    poller.poll({})


def wait_found(polled: Polled, path: Path, change: Callable[[], object]) -> None:
    """Wait until a change of this path is found."""
    _, found = polled
    found.clear()
    change()
    wait_until(lambda: str(path) in found, f"a change of {path} was found")


def test_polling_finds_each_kind_of_change(polled: Polled, tmp_path: Path) -> None:
    """Written, also with the size and the time that it had.

    Gone, back, and the folder replaced: but no other name.
    """
    poller, found = polled
    file, other, folder = tmp_path / "deep/file", tmp_path / "deep/other", tmp_path / "deep"
    folder.mkdir()
    file.write_text("text A")
    poller.poll({str(folder): {"file"}, str(tmp_path): set()})
    wait_found(
        polled, file, lambda: None
    )  # the first poll finds all new: it may have changed before
    wait_found(polled, file, lambda: file.write_text("a longer text"))
    info = file.stat()
    wait_found(
        polled,
        file,
        lambda: (file.write_text("a longer word"), os.utime(file, ns=(0, info.st_mtime_ns))),
    )
    wait_found(polled, file, file.unlink)
    wait_found(polled, file, lambda: file.write_text("back"))
    wait_found(polled, file, lambda: file.chmod(0o600))

    found.clear()
    other.write_text("nobody asked for it")
    wait_found(polled, file, lambda: file.write_text("once more"))
    assert str(other) not in found

    def replace() -> None:
        folder.rename(tmp_path / "old")
        folder.mkdir()
        file.write_text("of another folder")

    wait_found(polled, file, replace)
    wait_found(polled, file, lambda: file.write_text("and edited there"))


def test_polling_finds_every_name_where_all_matter(polled: Polled, tmp_path: Path) -> None:
    """Also beside a folder on the way to another place.

    A folder that is not there is waited for.
    """
    poller, _ = polled
    deep = tmp_path / "sub/deep"
    poller.poll({str(tmp_path): None, str(deep): {"file"}})
    wait_found(polled, tmp_path / "new", lambda: (tmp_path / "new").write_text("new"))
    wait_found(polled, deep, lambda: deep.mkdir(parents=True))
    wait_found(polled, deep / "file", lambda: (deep / "file").write_text("new"))


def test_polling_takes_two_threads_for_all(polled: Polled, files: list[Path], threads: int) -> None:
    """One that looks and one that tells, whatever is polled; none once nothing is."""
    poller, _ = polled
    poller.poll({str(file.parent): {file.name} for file in files})
    assert threading.active_count() == threads + 2
    for file in files:
        wait_found(polled, file, lambda file=file: file.write_text("after"))  # type: ignore[misc]
    poller.poll({})
    wait_until(lambda: threading.active_count() == threads, "the threads ended")
