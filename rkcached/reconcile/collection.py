"""Garbage collection by a look: finds rubbish before the look acts, removes it afterwards.

On the event loop, beside the reconciler; `rkcached gc` uses `named_in` and `find` without a daemon.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from rkcached.errors import RkcachedError
from rkcached.reconcile.observer import Observation
from rkcached.sources.records import Key
from rkcached.store.garbage import Named, Rubbish, find_rubbish, remove_rubbish
from rkcached.store.store import Store


@dataclass(slots=True, kw_only=True)
class Collection:
    """Somebody waits for what a look that began after the question finds.

    On the event loop, beside the reconciler.
    """

    dry_run: bool
    strangers: bool
    future: asyncio.Future[list[Rubbish]]
    rubbish: list[Rubbish] = field(default_factory=list)
    named: Named = field(default_factory=lambda: Named((), ()))

    async def find(
        self,
        store: Store,
        look: Observation,
        building: Key | None,
        inputs: tuple[list[Path], list[Path]],
    ) -> None:
        """Before anything is removed: orphans go by themselves.

        `inputs` are the look's files and folders.
        """
        try:
            if look.store_trouble is not None:
                raise look.store_trouble
            self.named = await asyncio.to_thread(named_in, look, *inputs)
            self.rubbish = await asyncio.to_thread(
                find, store, look, self.named, building, strangers=self.strangers
            )
        except RkcachedError as error:
            self._fail(error)

    async def finish(self, store: Store, removed: set[Key]) -> None:
        """Remove the rest, and say what went, or what may go.

        `removed` are the orphans that are gone.
        """
        if not self.dry_run:
            orphans = [_outcome(item, removed) for item in self.rubbish if item.key is not None]
            rest = [item for item in self.rubbish if item.key is None]
            try:
                for item in orphans:  # some were put aside by the look
                    if item.key is not None and not item.stays:
                        await asyncio.to_thread(store.retired.remove_of, item.key)
                others = await asyncio.to_thread(remove_rubbish, store, rest, self.named)
                self.rubbish = [*orphans, *others]
            except RkcachedError as error:
                self._fail(error)
        if not self.future.done():  # who asked may have gone meanwhile
            self.future.set_result(self.rubbish)

    def _fail(self, error: RkcachedError) -> None:
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # its caller may be gone


def _outcome(orphan: Rubbish, removed: set[Key]) -> Rubbish:
    """What became of an orphan, which the look removes, retires or fails to."""
    if orphan.stays or orphan.key in removed:
        return orphan
    why = "it could not be removed now: the daemon's log says why; it is tried again"
    return replace(orphan, why=f"{orphan.why}; {why}", stays=True, failed=True)


def named_in(look: Observation, files: Iterable[Path], folders: Iterable[Path]) -> Named:
    """Everything that the manifest of this look names; `files` and `folders` are its inputs.

    Blocking.
    """
    prompts = (Path(file) for declared in look.sources.prompts.values() for file in declared.files)
    return Named([*files, *prompts], folders)


def find(
    store: Store,
    look: Observation,
    named: Named,
    building: Key | None = None,
    *,
    strangers: bool = False,
) -> list[Rubbish]:
    """As `find_rubbish`, for what this look saw. Blocking."""
    return find_rubbish(
        store,
        look.inventory,
        look.actions,
        look.manifest.models,
        named,
        building=building,
        strangers=strangers,
    )
