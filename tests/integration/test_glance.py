"""An edited prompt is built before everything else is looked at.

Only if that is sure to be right.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Collection
from pathlib import Path

import pytest
from conftest import Workspace

from rkcached.host.trails import places
from rkcached.host.watch import Watcher
from rkcached.plan.records import State
from rkcached.reconcile.loop import Reconciler
from rkcached.sources.records import Key
from rkcached.store.sidecar import Inventory, Sidecar, StoredArtifact
from rkcached.store.store import Store
from tests.integration.reconciling import reconciling
from tests.waiting import DEADLINE_S, wait_until

A = Key("m", "a")
PARAMS = "{max_context_len: 200000}"
MAX_BYTES = 1 << 20


class HeldStore(Store):
    """A store whose scan can be held up: a look does not get past it.

    And its commits: a build does not.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.commits, self.may_commit = threading.Event(), threading.Event()
        self.may_commit.set()

    def hold(self) -> None:
        self.reached.clear()
        self.go_on.clear()

    def scan(self) -> Inventory:
        self.reached.set()
        self.go_on.wait(DEADLINE_S)
        return super().scan()

    def commit(
        self, key: Key, staged: Path, sidecar: Sidecar, prefix: bytes, *, retire: bool = False
    ) -> StoredArtifact:
        if not self.may_commit.is_set():
            self.commits.set()
            self.may_commit.wait(DEADLINE_S)
        return super().commit(key, staged, sidecar, prefix, retire=retire)


def declare(space: Workspace, top: str = "") -> None:
    """All that is in two folders."""
    prompts = "    prompts_from: [prompts/*.md, more/*.md]\n"
    space.declare("{}", params=PARAMS, top=top, model=prompts)


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    space = Workspace(tmp_path)
    space.memory_model(context_tokens=200_000)
    space.write("prompts/a.md", "word " * 100)
    space.write("prompts/b.md", "other " * 100)
    declare(space)
    (tmp_path / "more").mkdir()
    return space


@pytest.fixture
def store(tmp_path: Path) -> HeldStore:
    return HeldStore(tmp_path / "cache")


@pytest.fixture
async def reconciler(space: Workspace, store: HeldStore) -> AsyncIterator[Reconciler]:
    async with reconciling(space, store) as reconciler:
        await reconciler.ready.wait()
        await asyncio.to_thread(
            wait_until, lambda: reconciler.snapshot.builds == 2, "both are built"
        )
        await reconciler.next_look()
        try:
            yield reconciler
        finally:
            store.go_on.set()
            store.may_commit.set()


async def edited(reconciler: Reconciler, store: HeldStore, *paths: Path) -> int:
    """The builds that were done when the look, told of these paths, is held up at the store."""
    store.hold()
    reconciler.look_again([str(path) for path in paths], now=True)
    assert await asyncio.to_thread(store.reached.wait, 10)
    if reconciler.snapshot.building is not None and (task := reconciler._builds._task) is not None:
        await task
    return reconciler.snapshot.builds


async def budget(space: Workspace, reconciler: Reconciler) -> None:
    """Declare the prompts as before.

    There is room for their caches, and for no more than 100,000 tokens.
    """
    declare(space, f"cache: {{max_bytes: {MAX_BYTES}}}")
    await reconciler.next_look()
    assert reconciler.snapshot.manifest.cache.max_bytes == MAX_BYTES


async def finish(reconciler: Reconciler, store: HeldStore) -> None:
    store.go_on.set()
    await reconciler.next_look()
    await asyncio.to_thread(
        wait_until, lambda: reconciler.snapshot.building is None, "no build runs"
    )
    await reconciler.next_look()


async def test_an_edit_is_built_while_the_look_goes_on(
    space: Workspace, store: HeldStore, reconciler: Reconciler
) -> None:
    before = reconciler.snapshot.index.get(A)
    path = space.write("prompts/a.md", "new words " * 100)
    assert await edited(reconciler, store, path) == 3
    served = reconciler.snapshot.index.get(A)
    assert served is not None
    assert before is not None
    assert served.sidecar.fingerprint != before.sidecar.fingerprint
    assert reconciler.snapshot.desired.texts[A].startswith("new words")
    await finish(reconciler, store)
    assert reconciler.snapshot.builds == 3
    assert reconciler.snapshot.index.get(A) == served
    assert {one.state for one in reconciler.snapshot.assessments.values()} == {State.FRESH}


async def test_a_file_that_did_not_change_builds_nothing(
    space: Workspace, store: HeldStore, reconciler: Reconciler
) -> None:
    path = space.root / "prompts/a.md"
    path.touch()
    assert await edited(reconciler, store, path) == 2
    assert reconciler.snapshot.index.get(A) is not None
    await finish(reconciler, store)
    assert reconciler.snapshot.builds == 2


async def test_a_second_file_of_the_same_name_is_not_taken_for_it(
    space: Workspace, store: HeldStore, reconciler: Reconciler
) -> None:
    path = space.write("more/a.md", "a text of somebody else " * 100)
    assert await edited(reconciler, store, path) == 2
    assert reconciler.snapshot.desired.texts[A].startswith("word")
    await finish(reconciler, store)
    assert reconciler.snapshot.builds == 2
    assert reconciler.snapshot.assessments[A].state is State.BLOCKED


async def test_a_text_that_cannot_be_used_is_left_to_the_look(
    space: Workspace, store: HeldStore, reconciler: Reconciler
) -> None:
    path = space.write("prompts/a.md", b"\0")
    assert await edited(reconciler, store, path) == 2
    await finish(reconciler, store)
    assert reconciler.snapshot.builds == 2
    assert reconciler.snapshot.assessments[A].state is State.BLOCKED


async def test_a_manifest_that_changed_too_is_looked_at_first(
    space: Workspace, store: HeldStore, reconciler: Reconciler
) -> None:
    path = space.write("prompts/a.md", "new words " * 100)
    space.declare("{b: prompts/b.md}", params=PARAMS)
    assert await edited(reconciler, store, path) == 2
    await finish(reconciler, store)
    assert reconciler.snapshot.builds == 2
    assert A not in reconciler.snapshot.assessments


async def test_a_text_that_changes_again_is_built_as_it_is_at_the_end(
    space: Workspace, store: HeldStore, reconciler: Reconciler
) -> None:
    path = space.write("prompts/a.md", "new words " * 100)
    assert await edited(reconciler, store, path) == 3
    space.write("prompts/a.md", "the last words " * 100)
    await finish(reconciler, store)
    assert reconciler.snapshot.builds == 4
    served, wanted = reconciler.snapshot.index.get(A), reconciler.snapshot.desired.fingerprint(A)
    assert served is not None
    assert wanted is not None
    assert served.sidecar.fingerprint == wanted.digest
    assert reconciler.snapshot.desired.texts[A].startswith("the last words")


async def test_an_edit_within_a_budget_is_built_while_the_look_goes_on(
    space: Workspace, store: HeldStore, reconciler: Reconciler
) -> None:
    await budget(space, reconciler)
    path = space.write("prompts/a.md", "text " * 100)
    assert await edited(reconciler, store, path) == 3
    await finish(reconciler, store)
    assert reconciler.snapshot.builds == 3
    assert {one.state for one in reconciler.snapshot.assessments.values()} == {State.FRESH}


async def test_a_text_that_does_not_fit_is_tried_once(
    space: Workspace, store: HeldStore, reconciler: Reconciler
) -> None:
    await budget(space, reconciler)
    path, served = (
        space.write("prompts/a.md", "too much " * 15_000),
        reconciler.snapshot.index.get(A),
    )
    assert await edited(reconciler, store, path) == 2
    assert reconciler.snapshot.index.get(A) is None, (
        "the glance saw it, and its build found no room"
    )
    await finish(reconciler, store)
    assert reconciler.snapshot.assessments[A].state is State.BLOCKED
    assert reconciler.snapshot.used_bytes() <= MAX_BYTES
    # As it was before, and again too much: that is known now, so it is for the look to say what may
    # make room.
    space.write("prompts/a.md", "word " * 100)
    await reconciler.next_look()
    assert reconciler.snapshot.index.get(A) == served
    path = space.write("prompts/a.md", "too much " * 15_000)
    assert await edited(reconciler, store, path) == 2
    assert reconciler.snapshot.index.get(A) == served, "the glance left it alone"
    await finish(reconciler, store)
    assert reconciler.snapshot.assessments[A].state is State.BLOCKED
    assert (reconciler.snapshot.builds, reconciler.snapshot.used_bytes() <= MAX_BYTES) == (2, True)


async def test_what_is_being_replaced_is_not_removed(
    space: Workspace, store: HeldStore, reconciler: Reconciler
) -> None:
    """A budget comes that has no room for it, while its build commits.

    Both would change the same files at once.
    """
    space.write("prompts/a.md", "much " * 30_000)
    await reconciler.next_look()
    await asyncio.to_thread(
        wait_until, lambda: reconciler.snapshot.builds == 3, "the large one is built"
    )
    large = reconciler.snapshot.artifacts[A]
    assert large.sidecar.size_bytes > MAX_BYTES
    store.may_commit.clear()
    space.write("prompts/a.md", "new words " * 100)
    await reconciler.next_look()
    assert await asyncio.to_thread(store.commits.wait, 10)
    await budget(space, reconciler)
    assert reconciler.snapshot.artifacts[A] == large
    assert large.path.exists()
    store.may_commit.set()
    await asyncio.to_thread(
        wait_until, lambda: reconciler.snapshot.builds == 4, "the small one is built"
    )
    await reconciler.next_look()
    assert {one.state for one in reconciler.snapshot.assessments.values()} == {State.FRESH}
    assert reconciler.snapshot.builds == 4


async def test_the_watcher_says_which_file(space: Workspace) -> None:
    heard: list[str] = []
    told = asyncio.Event()

    def look_again(changed: Collection[str]) -> None:
        heard.extend(changed)
        if changed:
            told.set()

    watcher = Watcher(look_again)
    named = space.root / "prompts/a.md"
    try:
        watcher.follow(places([named, space.manifest], [space.root / "more"]))
        space.write("prompts/b.md", "nobody follows it")
        named.write_text("followed")
        async with asyncio.timeout(DEADLINE_S):
            await told.wait()
        assert set(heard) == {str(named)}
        new = space.write("more/c.md", "any name in this folder matters")
        async with asyncio.timeout(DEADLINE_S):
            while str(new) not in heard:  # one change may be told twice
                told.clear()
                await told.wait()
        assert set(heard) == {str(named), str(new)}
    finally:
        watcher.close()
