"""Finds and removes rubbish: orphans, retired artifacts, the quarantine; strangers, if asked.

The store's own is known by name and kind, and only by these. All else in its folder is a
stranger's: listed with its size, and left until it is asked for. A file that the manifest names is
never removed. Nothing is followed: links are removed as links, and no folder is reached through
one. Removing needs the store's lock: the reconciler does it for `POST /v1/gc`, and `rkcached gc`
where no daemon runs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rkcached.errors import StoreError
from rkcached.host import beneath
from rkcached.plan.records import Action, Adopt, Remove, Retire
from rkcached.sources.problems import NAME
from rkcached.sources.records import Key
from rkcached.store import marks
from rkcached.store.scan import STAGING, STAGING_FOLDER, prompt_of
from rkcached.store.sidecar import Inventory
from rkcached.store.store import Store

ASK = "not the store's: --strangers removes it"
NAMED = "not the store's; it stays, as the manifest names it"
IN_USE = "not the store's; it stays, as a program may listen on it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubbish:
    """Something that may go, or a stranger's that stays."""

    path: Path
    size_bytes: int
    why: str
    key: Key | None = None
    """Of an orphan, whose files the store removes together."""
    seen: beneath.Identity | None = None
    """Only this is removed, not what comes in its place."""
    stays: bool = False
    """It is only listed; `why` says the reason."""
    stranger: bool = False
    failed: bool = False
    """It should have gone, and stays because it could not be removed."""


class Named:
    """The files that the manifest names: nobody removes them, by whatever name or link.

    Of a folder, what is directly in it is named, too: prompts, and those that are to become
    prompts.
    """

    def __init__(self, files: Iterable[Path], folders: Iterable[Path]) -> None:
        """Blocking: looks at each of them."""
        self._places: set[str] = set()
        self._identities: set[tuple[int, int]] = set()
        self._folders = {os.path.realpath(folder) for folder in folders}

        for file in files:
            its_folder = os.path.realpath(file.parent)
            self._places.add(os.path.join(its_folder, file.name))  # noqa: PTH118 - a link itself
            self._places.add(os.path.realpath(file))

            for follow in (True, False):
                try:
                    info = file.stat(follow_symlinks=follow)
                except OSError:
                    continue

                self._identities.add((info.st_dev, info.st_ino))

    def spares(self, info: os.stat_result) -> bool:
        """Whether this is one of the files."""
        return (info.st_dev, info.st_ino) in self._identities

    def has(self, seen: beneath.Identity | None) -> bool:
        """As `spares`."""
        return seen is not None and (seen.device, seen.inode) in self._identities

    def files(self) -> Iterator[Path]:
        """Their real paths."""
        return map(Path, self._places)

    def holds(self, place: str) -> bool:
        """Whether a real path is one of them, or a folder that has one of them in it."""
        within = place + os.sep
        every = self._places | self._folders
        if place in every or str(Path(place).parent) in self._folders:
            return True
        return any(path.startswith(within) for path in every)


def find_rubbish(
    store: Store,
    inventory: Inventory,
    actions: Iterable[Action],
    models: Container[str],
    named: Named,
    *,
    building: Key | None = None,
    strangers: bool = False,
) -> list[Rubbish]:
    """Find what may go, and the strangers that stay, but for files that `building` may be writing.

    `actions` are the plan for the `inventory`, `models` the declared ones. Changes nothing.
    Errors: StoreError.
    """
    actions = tuple(actions)

    try:
        orphans = list(_orphans(store, actions))
        quarantined = [
            Rubbish(
                path=path, size_bytes=size_bytes, why="quarantined", seen=_identity(store, path)
            )
            for path, size_bytes in inventory.quarantined.items()
        ]
        retired = list(_retired(store, inventory, actions))
        others = [
            _stranger(store, names, named, goes=strangers)
            for names in _strangers(store, inventory, models, building)
        ]
    except OSError as error:
        raise StoreError(
            f"the store {store.root} cannot be read: {error.strerror}",
            hint="check the directory's permissions",
        ) from error

    return [*orphans, *retired, *quarantined, *others]


def remove_rubbish(store: Store, rubbish: Iterable[Rubbish], named: Named) -> list[Rubbish]:
    """Remove it, but for what stays; returns what is gone and what stays, in this order of each.

    The store must be open. A stranger's that cannot be removed stays, with the reason. Errors:
    StoreError.
    """
    store.spare(named.files())
    done = []

    for item in rubbish:
        if item.stays:
            done.append(item)
        elif item.key is not None:
            store.remove(item.key)
            done.append(item)
        elif (outcome := _remove(store, item, named)) is not None:
            done.append(outcome)

    return done


def as_data(rubbish: Iterable[Rubbish]) -> dict[str, list[dict[str, Any]]]:
    """Sort rubbish by what becomes of it: `items` go, `strangers` stay, `failed` could not go."""
    data: dict[str, list[dict[str, Any]]] = {"items": [], "strangers": [], "failed": []}

    for item in rubbish:
        path = os.fsencode(item.path).decode(errors="backslashreplace")
        shown = {"path": path, "size_bytes": item.size_bytes, "reason": item.why}
        kind = "failed" if item.failed else "strangers" if item.stays else "items"
        data[kind].append(shown)

    return data


def _remove(store: Store, item: Rubbish, named: Named) -> Rubbish | None:
    """Remove one thing. None: somebody else put another thing in its place.

    Errors: StoreError.
    """
    names = item.path.relative_to(store.root).parts

    try:
        if beneath.remove(store.root, *names, only=item.seen, spare=named.spares):
            return item
        if _identity(store, item.path) != item.seen:
            return None
        why = "something in it is named by the manifest, or is on another mount"
    except OSError as error:
        if not item.stranger:
            raise StoreError(
                f"{item.path} cannot be removed: {error.strerror}",
                hint="check the directory's permissions",
            ) from error

        why = f"it cannot be removed: {error.strerror}"

    return replace(item, why=f"not the store's; it stays, as {why}", stays=True)


def _orphans(store: Store, actions: Iterable[Action]) -> Iterator[Rubbish]:
    for action in actions:
        if isinstance(action, Retire) or (
            isinstance(action, Remove) and not (action.verdict or action.retired)
        ):
            folder = store.root / action.key.model
            names = beneath.names_in(store.root, action.key.model)
            files = [folder / name for name in names if prompt_of(name) == action.key.prompt]
            yield Rubbish(
                path=folder / f"{action.key.prompt}.json",
                size_bytes=sum(map(beneath.size_of, files)),
                why=action.reason,
                key=action.key,
            )


def _retired(store: Store, inventory: Inventory, actions: Iterable[Action]) -> Iterator[Rubbish]:
    """But for those that a declared prompt is about to adopt."""
    adopted = {
        action.fingerprint.digest
        for action in actions
        if isinstance(action, Adopt) and action.source is None
    }

    for artifact in inventory.retired.values():
        if artifact.fingerprint not in adopted:
            folder = store.retired.folder(artifact.fingerprint)
            why = f"retired: built for {artifact.key}, and no prompt uses it now"
            yield Rubbish(
                path=folder,
                size_bytes=beneath.size_of(folder),
                why=why,
                seen=_identity(store, folder),
            )


def _strangers(
    store: Store, inventory: Inventory, models: Container[str], building: Key | None
) -> Iterator[tuple[str, ...]]:
    """Where in the store something lies that is not its own: names from its top.

    Errors: OSError.
    """
    for name in beneath.names_in(store.root):
        path = store.root / name
        if name in marks.OWN_FOLDERS and not beneath.is_folder(path):
            yield (name,)
        elif name == marks.QUARANTINE:
            yield from _among(store, name, marks.is_quarantined)
        elif name == marks.RETIRED:
            yield from _among(store, name, marks.is_retired)
            yield from _beside_retired(store)
        elif name == marks.VERDICTS:
            yield from _in_verdicts(store)
        elif marks.is_own(name):
            continue
        elif not beneath.is_folder(path):
            if path in inventory.foreign:
                yield (name,)
        elif NAME.fullmatch(name):
            yield from _beside_artifacts(store, inventory, name, building, known=name in models)
        else:
            yield (name,)


def _beside_retired(store: Store) -> Iterator[tuple[str, ...]]:
    """Whatever is no part of an artifact in the folders of the retired ones."""
    for folder in store.retired.folders():
        theirs = store.retired.strangers_in(folder.name)
        yield from ((marks.RETIRED, folder.name, name) for name in theirs)


def _among(store: Store, place: str, is_own: Callable[[str], bool]) -> Iterator[tuple[str, ...]]:
    """Whatever is not one of the store's own folders in this place."""
    for name in beneath.names_in(store.root, place):
        if not (is_own(name) and beneath.is_folder(store.root / place / name)):
            yield place, name


def _in_verdicts(store: Store) -> Iterator[tuple[str, ...]]:
    for model in beneath.names_in(store.root, marks.VERDICTS):
        if not (NAME.fullmatch(model) and beneath.is_folder(store.root / marks.VERDICTS / model)):
            yield marks.VERDICTS, model
            continue
        for name in beneath.names_in(store.root, marks.VERDICTS, model):
            if not marks.is_verdict(name):
                yield marks.VERDICTS, model, name


def _beside_artifacts(
    store: Store, inventory: Inventory, model: str, building: Key | None, *, known: bool
) -> Iterator[tuple[str, ...]]:
    """The strangers in the folder of a model; the folder itself, if all in it is theirs.

    Errors: OSError.
    """
    folder = store.root / model
    names = beneath.names_in(store.root, model)
    if beneath.is_folder(folder / STAGING_FOLDER):
        names.remove(STAGING_FOLDER)
    theirs = [
        name
        for name in names
        if (folder / name in inventory.foreign or beneath.is_folder(folder / name))
        and (building is None or (model, prompt_of(name)) != building)
    ]
    if names and len(theirs) == len(names) and not known:
        yield (model,)
        return

    yield from ((model, name) for name in theirs)
    for name in beneath.names_in(store.root, model, STAGING_FOLDER):
        if not name.startswith(STAGING):
            yield model, STAGING_FOLDER, name


def _stranger(store: Store, names: tuple[str, ...], named: Named, *, goes: bool) -> Rubbish:
    path = store.root.joinpath(*names)
    root = os.path.realpath(store.root)
    place = os.path.join(root, *names)  # noqa: PTH118 - a link in it is not followed
    seen = beneath.identity(store.root, *names)
    why, stays = "not the store's", not goes
    if named.holds(place) or named.has(seen):
        why, stays = NAMED, True
    elif seen is not None and stat.S_ISSOCK(seen.kind):
        why, stays = IN_USE, True
    elif stays:
        why = ASK

    return Rubbish(
        path=path, size_bytes=beneath.size_of(path), why=why, seen=seen, stays=stays, stranger=True
    )


def _identity(store: Store, path: Path) -> beneath.Identity | None:
    return beneath.identity(store.root, *path.relative_to(store.root).parts)
