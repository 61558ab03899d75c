"""What happens between the steps of a look."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace

from rkcached.errors import Aborted, SourceError, StoreError, Uncacheable
from rkcached.plan.records import State
from rkcached.reconcile.loop import Reconciler
from rkcached.sources.records import Key
from rkcached.store.sidecar import StoredArtifact
from rkcached.store.store import Store
from tests.integration.reconciling import reconciling
from tests.waiting import wait_until


class SlowTidying(Store):
    """A store that can be held up in the part of a look that follows the scan."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def tidy(self, *arguments: Any) -> None:
        self.reached.set()
        self.go_on.wait(30)
        super().tidy(*arguments)

    async def hold_up(self, reconciler: Reconciler) -> None:
        """Begin another look, which waits there for `go_on`."""
        await reconciler.ready.wait()
        self.go_on.clear()
        self.reached.clear()
        reconciler.look_again(now=True)


@pytest.fixture
def slow(tmp_path: Path) -> tuple[Workspace, SlowTidying]:
    space = Workspace(tmp_path)
    space.memory_model(prefill_us_per_token=2_000)
    space.write("prompts/a.md", "word " * 100)
    space.declare("{a: prompts/a.md}")
    return space, SlowTidying(tmp_path / "cache")


async def test_a_build_that_ends_during_a_look_is_not_done_again(
    slow: tuple[Workspace, SlowTidying],
) -> None:
    """The look saw the store before it was published, and may not act on that."""
    space, store = slow
    async with reconciling(space, store) as reconciler:
        await reconciler.ready.wait()
        await asyncio.to_thread(
            wait_until, lambda: reconciler.snapshot.building is not None, "a build runs"
        )
        await store.hold_up(reconciler)
        assert await asyncio.to_thread(store.reached.wait, 10)
        assert reconciler.snapshot.builds == 0, (
            "the build was to end during the look: make it slower"
        )
        await asyncio.to_thread(wait_until, lambda: reconciler.snapshot.builds, "the build is over")
        store.go_on.set()
        await reconciler.next_look()
        await reconciler.next_look()
        assert (reconciler.snapshot.building, reconciler.snapshot.builds) == (None, 1)
        assert reconciler.snapshot.index.get(Key("m", "a")) is not None


async def test_a_build_that_steps_aside_during_a_look_is_not_forgotten(
    slow: tuple[Workspace, SlowTidying], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request took its model while the daemon looked.

    The build is made afterwards, without another event.
    """
    space, store = slow
    async with reconciling(space, store) as reconciler:
        build, tried = reconciler._builds._builder.build, asyncio.Event()

        async def step_aside(*_: Any) -> Any:
            monkeypatch.setattr(reconciler._builds._builder, "build", build)
            assert await asyncio.to_thread(store.reached.wait, 10)
            tried.set()
            raise Aborted("a request needs the model")

        monkeypatch.setattr(reconciler._builds._builder, "build", step_aside)
        await store.hold_up(reconciler)
        await tried.wait()
        await asyncio.to_thread(
            wait_until, lambda: reconciler.snapshot.building is None, "it has stepped aside"
        )
        store.go_on.set()
        await asyncio.to_thread(wait_until, lambda: reconciler.snapshot.builds, "the build is over")


async def test_what_a_build_finds_out_during_a_look_is_not_tried_again(
    slow: tuple[Workspace, SlowTidying], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build finds its model uncacheable after the look saw the store.

    That look starts no build of the model.
    """
    space, store = slow
    space.write("prompts/b.md", "other " * 100)
    space.declare("{a: prompts/a.md, b: prompts/b.md}")
    async with reconciling(space, store) as reconciler:
        tried: list[Key] = []

        async def cannot_be_saved(request: Any, *_: Any) -> Any:
            tried.append(request.action.key)
            assert await asyncio.to_thread(store.reached.wait, 10)
            raise Uncacheable("this model does not support saving prompt caches")

        monkeypatch.setattr(reconciler._builds._builder, "build", cannot_be_saved)
        await store.hold_up(reconciler)
        await asyncio.to_thread(
            wait_until,
            lambda: tried and reconciler.snapshot.building is None,
            "the build has failed",
        )
        store.go_on.set()
        await reconciler.next_look()
        await reconciler.next_look()
        assert tried == [Key("m", "a")]
        assert {one.state for one in reconciler.snapshot.assessments.values()} == {
            State.UNCACHEABLE
        }


class NoRoomToCopy(Store):
    """A store whose disk takes no copy of an artifact."""

    refused = 0

    def adopt(self, *_: Any, **__: Any) -> StoredArtifact:
        self.refused += 1
        raise StoreError("no space left", hint="make room there")


async def test_who_waits_for_an_adoption_that_fails_is_told(tmp_path: Path) -> None:
    """A client that stores a text is not left hanging.

    The failing is not repeated in a loop.
    """
    space, store = Workspace(tmp_path), NoRoomToCopy(tmp_path / "cache")
    space.memory_model()
    space.write("prompts/a.md", "The same text.")
    space.declare("{a: prompts/a.md}")
    async with reconciling(space, store) as reconciler:
        await asyncio.to_thread(
            wait_until, lambda: reconciler.snapshot.builds == 1, "the first is built"
        )
        space.write("prompts/b.md", "The same text.")
        space.declare("{a: prompts/a.md, b: prompts/b.md}")
        with pytest.raises(SourceError, match="m/b is blocked: no space left"):
            async with asyncio.timeout(30):
                await reconciler.freshen(Key("m", "b"))
        looks = reconciler.snapshot.looks
        await asyncio.sleep(0.3)
        assert (
            reconciler.snapshot.looks <= looks + 2
        )  # the end of the look that answered, and the one repeat
        assert store.refused <= 3
