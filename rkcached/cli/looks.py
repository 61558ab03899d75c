"""Looks at manifest, files and store without a daemon."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

from rkcached.cli.service_view import view_of
from rkcached.errors import SourceError
from rkcached.host.settings import Settings
from rkcached.reconcile.observer import Observation, Observer
from rkcached.sources.manifest_file import inputs, read_manifest
from rkcached.sources.stored_texts import StoredTexts
from rkcached.store import marks
from rkcached.store.seal import read_seal
from rkcached.store.store import Store, unreadable


def store_of(settings: Settings) -> Store:
    """The store, as far as this user may look at it."""
    return Store(settings.cache_dir, seal=read_seal(settings.state_dir))


def look_at(settings: Settings) -> Observation:
    """Read manifest, files and store.

    Errors: ManifestError; SourceError, StoreError of the store.
    """
    observer = Observer(store_of(settings), StoredTexts(settings.state_dir))
    look = observer.observe(read_manifest(settings.manifest))
    if look.store_trouble is not None:
        need_store(settings)
        raise look.store_trouble
    return look


def look_as_service(settings: Settings, *, ask: bool = False) -> Observation:
    """Look, and correct it by what the daemon sees differently."""
    look = look_at(settings)
    return view_of(settings, look.manifest, look.sources, ask=ask).over(look)


def inputs_of(settings: Settings, look: Observation) -> tuple[list[Path], list[Path]]:
    """The files and folders that a look depends on."""
    return inputs(look.manifest, StoredTexts(settings.state_dir))


def need_place(settings: Settings) -> None:
    """Errors: as `need_store`, where the folder is none that the daemon would make a store of."""
    try:
        if not marks.why_not_ours(settings.cache_dir):
            return
    except FileNotFoundError:
        return
    except OSError:
        pass

    need_store(settings)


def need_store(settings: Settings) -> None:
    """Errors: SourceError where there is no store; StoreError where that cannot be read."""
    try:
        why = marks.why_no_store(settings.cache_dir)
    except OSError as error:
        raise unreadable(settings.cache_dir, error) from error

    if not why:
        return

    hint = (
        "name the daemon's store with --cache-dir or RKCACHED_CACHE_DIR; "
        "if there is none yet, `rkcached run` makes it"
    )
    beside = settings.manifest.parent / "cache"
    with contextlib.suppress(OSError):
        if beside != settings.cache_dir and not marks.why_no_store(beside):
            named = shlex.quote(str(beside))
            hint = f"there is a store beside the manifest: use --cache-dir {named}"

    raise SourceError(f"there is no store at {settings.cache_dir}: {why}", hint=hint)
