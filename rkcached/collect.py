"""What serves nobody and may leave the store: orphans, the quarantine, files that are not the store's.

Only what lies where the store puts files is looked at, and nothing is followed: links are removed as links, and folders
that others made stay. Removing needs the store's lock: the reconciler does it for `POST /v1/gc`, and `rkcached gc`
where no daemon runs.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rkcached.errors import RkcachedError, StoreError
from rkcached.observe import Look
from rkcached.plan import Key, Remove, plan
from rkcached.scan import prompt_of
from rkcached.store import Store, size_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubbish:
    """Something that may go. `key` for an orphan, whose files the store removes together."""

    path: Path
    size_bytes: int
    why: str
    key: Key | None = None


@dataclass(slots=True, kw_only=True)
class Collection:
    """Somebody waits for what a look that began after the question finds. On the event loop, beside the reconciler."""

    dry_run: bool
    future: asyncio.Future[list[Rubbish]]
    rubbish: list[Rubbish]

    async def find(self, store: Store, look: Look, building: Key | None) -> None:
        """Before anything is removed: orphans go by themselves."""
        try:
            if look.store_trouble is not None:
                raise look.store_trouble
            self.rubbish = await asyncio.to_thread(find_rubbish, store, look, building)
        except RkcachedError as error:
            self._fail(error)

    async def finish(self, store: Store, removed: set[Key]) -> None:
        """Remove the rest, and say what went, or what may go. `removed` are the orphans that are gone."""
        if not self.dry_run:
            self.rubbish = [one for one in self.rubbish if one.key is None or one.key in removed]
            try:
                await asyncio.to_thread(remove_rubbish, store, [one for one in self.rubbish if one.key is None])
            except RkcachedError as error:
                self._fail(error)
        if not self.future.done():  # who asked may have gone meanwhile
            self.future.set_result(self.rubbish)

    def _fail(self, error: RkcachedError) -> None:
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # its caller may be gone


def find_rubbish(store: Store, look: Look, building: Key | None = None) -> list[Rubbish]:
    """What may go, but for what may just become a file of `building`. Changes nothing. Errors: StoreError."""
    try:
        orphans = list(_orphans(store, look))
    except OSError as error:
        raise StoreError(
            f"the store {store.root} cannot be read: {error.strerror}", hint="check the directory's permissions"
        ) from error
    inventory = look.inventory
    quarantined = [
        Rubbish(path=path, size_bytes=size_bytes, why="quarantined")
        for path, size_bytes in inventory.quarantined.items()
    ]
    foreign = [
        Rubbish(path=path, size_bytes=size_bytes, why="not a file of the store")
        for path, size_bytes in inventory.foreign.items()
        if building is None or (path.parent.name, prompt_of(path.name)) != building
    ]
    return [*orphans, *quarantined, *foreign]


def remove_rubbish(store: Store, rubbish: list[Rubbish]) -> None:
    """Remove it; the store must be open. Errors: StoreError."""
    for one in rubbish:
        if one.key is not None:
            store.remove(one.key)
            continue
        try:
            if one.path.is_dir() and not one.path.is_symlink():
                shutil.rmtree(one.path)
            else:
                one.path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"{one.path} cannot be removed: {error.strerror}", hint="check the directory's permissions"
            ) from error


def _orphans(store: Store, look: Look) -> Iterator[Rubbish]:
    for action in plan(look.assessments):
        if isinstance(action, Remove) and action.verdict is None:
            folder = store.root / action.key.model
            files = [path for path in folder.iterdir() if prompt_of(path.name) == action.key.prompt]
            size_bytes = sum(map(size_of, files))
            yield Rubbish(
                path=folder / f"{action.key.prompt}.json", size_bytes=size_bytes, why=action.reason, key=action.key
            )
