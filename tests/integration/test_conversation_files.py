"""Saved conversations on real files: a clumsy hand in their folder, and limits that change."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from rkcached.engines.base import ModelSpec
from rkcached.reconcile.snapshot import Published
from rkcached.serving.conversations import Conversations
from rkcached.sources.manifest import Manifest
from rkcached.sources.parser import parse
from rkcached.store.conversations import Record
from rkcached.store.scan import STAGING_FOLDER
from rkcached.store.store import Store
from rkcached.worker import protocol
from rkcached.worker.model import WorkerModel
from tests.waiting import DEADLINE_S

MODEL = WorkerModel(
    name="m",
    identity="i",
    implementation="memory",
    spec=ModelSpec(path="m.model", context_tokens=4096),
    idle_unload_s=None,
)


class Place:
    """A store and a manifest, and what a daemon makes of its saved conversations."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(root / "cache")
        self.store.open()
        self.folder = root / "cache/.conversations/m"
        self.published = Published(self.manifest(), self.store.digests)
        self.talks = Conversations(self.store.conversations, self.published)

    def manifest(self, limits: str = "{}", model: str = "m") -> Manifest:
        text = f"version: 1\nengine: {{kind: memory}}\ncache: {{conversations: {limits}}}\n"
        text += f"models: {{{model}: {{path: m.model}}}}\n"
        return parse(text, file=self.root / "manifest.yaml")

    def limit(self, limits: str) -> None:
        """A manifest with these limits comes into force."""
        self.published.change(manifest=self.manifest(limits))

    def write(self, data: bytes) -> Path:
        """Begin as a worker does that saves a conversation."""
        path = Path(self.talks.places(MODEL, 1)[0])
        path.write_bytes(data)
        return path

    async def save(self, text: str, size_bytes: int = 1000) -> None:
        """Do what a worker does that saves a conversation."""
        path = self.write(os.urandom(size_bytes))
        saved = protocol.Saved(
            id=1, path=str(path), text=text, asked_bytes=200, owner=7, tokens=9, save_ms=1.0
        )
        known = len(self.talks.of(None))
        self.talks.take(MODEL, saved)
        await self.until(known + 1)

    async def until(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.talks.of(None)) != count:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)

    async def restart(self) -> None:
        """Another daemon takes over what this one saved."""
        await self.talks.close()
        self.talks = Conversations(self.store.conversations, self.published)
        await self.talks.open()

    def names(self, suffix: str) -> list[str]:
        """Also of what a worker has not finished."""
        files = self.folder.rglob(f"*{suffix}")
        return [path.name for path in files if path.name != STAGING_FOLDER]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.store.close()


def talk(number: int) -> str:
    return f"{number} " * 300


@pytest.mark.parametrize("link", [".conversations", ".conversations/m"])
def test_nothing_is_written_through_a_link(place: Place, link: str) -> None:
    """Somebody moved the folder to another disk, with what was in it, and left a link."""
    outside = place.root / "disk"
    (outside / "m").mkdir(parents=True)
    path = place.store.root / link
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(outside)
    assert place.talks.places(MODEL, 2) == ()
    assert place.store.conversations.all() == []


async def test_a_pipe_or_a_link_in_place_of_a_record_is_not_read(place: Place) -> None:
    """A pipe would be waited for without end; who wrote what is behind a link, nobody knows."""
    await place.save(talk(1))
    await place.save(talk(2))
    for path, number in zip(sorted(place.folder.glob("*.json")), range(2), strict=True):
        if number:
            os.mkfifo(path.with_suffix(".pipe"))
            path.with_suffix(".pipe").rename(path)
        else:
            path.rename(place.root / "elsewhere.json")
            path.symlink_to(place.root / "elsewhere.json")
    await place.restart()
    assert len(place.talks.of(None)) == 0
    assert place.names("") == []
    assert (place.root / "elsewhere.json").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be refused as another user")
async def test_a_folder_of_somebody_else_stops_no_daemon(place: Place) -> None:
    await place.save(talk(1))
    for folder in (place.root, *place.root.parents[:2]):
        folder.chmod(0o755)
    place.store.root.chmod(0o755)
    os.seteuid(12001)
    try:
        await place.restart()
    finally:
        os.seteuid(0)
    assert len(place.talks.of(None)) == 0


@pytest.mark.parametrize("limits", ["{keep_s: 0}", "{max_bytes: 1MiB}"])
async def test_a_limit_holds_as_soon_as_it_is_declared(place: Place, limits: str) -> None:
    """Not only when the next conversation is saved."""
    for number in range(3):
        await place.save(talk(number), size_bytes=700_000)
    place.talks.look()
    assert len(place.talks.of(None)) == 3
    place.limit(limits)
    place.talks.look()
    await place.until(0 if "keep_s" in limits else 1)
    await place.talks.close()
    assert len(place.names(".state")) == len(place.talks.of(None))


async def test_those_of_a_model_that_is_no_longer_declared_go(place: Place) -> None:
    await place.save(talk(1))
    place.talks.look()
    assert len(place.talks.of(None)) == 1
    place.published.change(manifest=place.manifest(model="other"))
    place.talks.look()
    await place.until(0)
    await place.talks.close()
    assert place.names(".state") == []


async def test_a_clock_that_was_ahead_keeps_nothing_for_years(place: Place) -> None:
    await place.save(talk(1))
    (path,) = place.folder.glob("*.json")
    record = msgspec.json.decode(path.read_bytes(), type=Record)
    path.write_bytes(
        msgspec.json.encode(msgspec.structs.replace(record, used_at=time.time() + 1e9))
    )
    place.limit("{keep_s: 1}")
    await place.restart()
    assert len(place.talks.of(None)) == 1
    await place.until(0)


async def test_what_a_worker_left_that_died_over_a_save_goes(place: Place) -> None:
    """No restart of the daemon is needed, and what is whole stays."""
    await place.save(talk(1))
    place.write(b"the first half")
    assert len(place.names(".state")) == 2
    place.talks.places(MODEL, 2)
    assert len(place.names(".state")) == 1
    await place.restart()
    assert len(place.talks.of(None)) == 1


async def test_places_are_not_handed_out_while_a_state_is_in_one(place: Place) -> None:
    """Those that no worker used are offered again. What is saved is overwritten by nobody."""
    assert len(set(place.talks.places(MODEL, 3))) == 3
    path = place.write(b"state")
    saved = protocol.Saved(
        id=1, path=str(path), text=talk(1), asked_bytes=4, owner=1000, tokens=5, save_ms=0.1
    )
    place.talks.take(MODEL, saved)
    again = place.talks.places(MODEL, 3)
    assert len(set(again)) == 3
    assert str(path) not in again
    await place.talks.close()
    assert [talked.path.name for talked in place.talks.of(None)] == [path.name]
