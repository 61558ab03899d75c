"""`rkcached gc`: takes out of the store what serves nobody: orphans, the quarantine, files that are not the store's.

Only what lies where the store puts files is looked at, and nothing is followed: links are removed as links, and folders
that others made stay. Removing needs the store's lock, so nothing is taken from under a daemon; looking does not.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rkcached.errors import StoreError
from rkcached.manifest import NAME
from rkcached.observe import Look
from rkcached.plan import Key, Remove, plan
from rkcached.store import Store

_OWN = (".lock", ".digests.json", ".digests.json.tmp")
_STAGED = (".stage-", ".tmp")
"""A daemon may be writing these; the store sweeps what a crash left of them when it is opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubbish:
    """Something that may go. `key` for an orphan, whose files the store removes together."""

    path: Path
    size_bytes: int
    why: str
    key: Key | None = None


def find_rubbish(store: Store, look: Look) -> list[Rubbish]:
    """What may go. Changes nothing. Errors: StoreError when a directory cannot be read."""
    try:
        return [*_orphans(store, look), *_quarantined(store), *_foreign(store)]
    except OSError as error:
        raise StoreError(
            f"the store {store.root} cannot be read: {error.strerror}", hint="check the directory's permissions"
        ) from error


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
            files = [path for path in folder.iterdir() if _prompt_of(path.name) == action.key.prompt]
            size_bytes = sum(path.lstat().st_size for path in files)
            yield Rubbish(
                path=folder / f"{action.key.prompt}.json", size_bytes=size_bytes, why=action.reason, key=action.key
            )


def _quarantined(store: Store) -> Iterator[Rubbish]:
    kept = store.root / ".quarantine"
    for path in sorted(kept.iterdir()) if kept.is_dir() else ():
        size_bytes = sum(inner.lstat().st_size for inner in path.rglob("*") if not inner.is_dir())
        yield Rubbish(path=path, size_bytes=size_bytes, why="quarantined")


def _foreign(store: Store) -> Iterator[Rubbish]:
    if not store.root.is_dir():
        return
    for path in sorted(store.root.iterdir()):
        if path.is_dir() and not path.is_symlink():
            inside = sorted(path.iterdir()) if NAME.fullmatch(path.name) else []
            prompts = {inner.name[:-5] for inner in inside if inner.name.endswith(".json")}
            prompts |= {_prompt_of(inner.name) for inner in inside if inner.name.endswith("_cache")}
            for inner in inside:
                ours = _prompt_of(inner.name) in prompts or inner.name.startswith(_STAGED[0])
                if not ours and (inner.is_symlink() or not inner.is_dir()):
                    yield Rubbish(path=inner, size_bytes=inner.lstat().st_size, why="not a file of the store")
        elif path.name not in _OWN and not path.name.endswith(_STAGED[1]):
            yield Rubbish(path=path, size_bytes=path.lstat().st_size, why="not a file of the store")


def _prompt_of(name: str) -> str:
    """The prompt that a file with this name would belong to; nothing if the store has no such names."""
    stem, _, suffix = name.rpartition(".")
    return stem if NAME.fullmatch(stem) and (suffix in ("json", "bin") or suffix.endswith("_cache")) else ""
