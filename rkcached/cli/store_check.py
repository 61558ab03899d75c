"""Checks the store's place for `rkcached doctor`: is it taken as a store, and has it room.

Only reads. By the sidecars that are there, or by the model's header, it estimates what the caches
of all prompts will take.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

import msgspec

from rkcached.api import words
from rkcached.cli.board import Check, Outcome, size_of
from rkcached.engines.registry import ENGINES, EngineEntry
from rkcached.errors import StoreError, counted
from rkcached.host import disk, places, unit
from rkcached.host.regular import read_regular
from rkcached.sources.manifest import Manifest
from rkcached.sources.records import PromptSource, Sources
from rkcached.store.scan import MAX_RECORD_BYTES
from rkcached.store.sidecar import Sidecar
from rkcached.store.writer import check_place

# Of English text, roughly; other languages have fewer.
_LETTERS_PER_TOKEN: Final = 4


def store_check(manifest: Manifest, sources: Sources, cache_dir: Path) -> Check:
    """Whether the daemon would take this folder as its store, and whether its disk has room."""
    try:
        _check_taken(manifest, cache_dir)
    except StoreError as error:
        return Check(name="disk", outcome=Outcome.FAIL, finding=error.message, next_step=error.hint)

    free = disk.free_bytes(cache_dir) or 0
    used = sum(size_of(path) or 0 for path in cache_dir.glob("*/*_cache"))
    finding = f"{words.size(free)} free at {cache_dir}, {words.size(used)} in the store; "
    if manifest.cache.max_bytes:
        wanted = int(manifest.cache.max_bytes)
        finding += f"{words.size(wanted)} allowed by cache.max_bytes"
    else:
        wanted, estimate = _estimate(manifest, sources, cache_dir)
        finding += estimate

    if free + used < wanted:
        next_step = "make room, name a larger disk with --cache-dir, or set cache.max_bytes"
        return Check("disk", Outcome.WARN, finding, next_step)
    return Check("disk", Outcome.OK, finding)


def _check_taken(manifest: Manifest, cache_dir: Path) -> None:
    """Errors: StoreError, with which `rkcached run` would refuse the folder."""
    as_service = unit.MARK in os.environ
    installed = unit.installed()
    of_unit = as_service or (installed is not None and installed.uses(manifest=manifest.file))
    if of_unit and cache_dir == places.SYSTEM_CACHE and not os.path.lexists(cache_dir):
        return  # systemd makes it, by CacheDirectory=

    # Of a store of the unit's only its user can tell whether he may write there.
    check_place(cache_dir, may_write=as_service or not of_unit)


def _estimate(manifest: Manifest, sources: Sources, cache_dir: Path) -> tuple[int, str]:
    """The bytes that the prompts' caches will take, as far as that can be known, and in words."""
    known_bytes = known = unknown = 0
    for name, config in manifest.models.items():
        texts = []
        for key, declared in sources.prompts.items():
            if key.model == name and isinstance(declared.source, PromptSource):
                texts.append(len(declared.source.text.encode()))

        rate = _bytes_per_letter(cache_dir / name)
        if rate is None:
            with contextlib.suppress(OSError):
                rate = _by_model(ENGINES[manifest.engine.kind], config.path)

        if rate is None:
            unknown += len(texts)
        else:
            known += len(texts)
            known_bytes += round(sum(texts) * rate)

    parts = []
    if known:
        parts = [f"about {words.size(known_bytes)} needed by {counted(known, 'prompt')}"]

    if unknown:
        parts.append(
            f"what {counted(unknown, 'prompt')} will take is not known before one is built"
        )
    return known_bytes, ", and ".join(parts) or "no prompt needs space"


def _bytes_per_letter(folder: Path) -> float | None:
    """Of a model's prompt caches for each byte of text, by those that it has.

    None if it has none.
    """
    size_bytes = text_bytes = 0
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, RecursionError):
            data = read_regular(path, MAX_RECORD_BYTES, follow=False)
            sidecar = msgspec.json.decode(data, type=Sidecar)
            letters = int(sidecar.components["prefix.bytes"])
            size_bytes = size_bytes + sidecar.size_bytes
            text_bytes = text_bytes + letters

    if text_bytes:
        return size_bytes / text_bytes
    return None


def _by_model(engine: EngineEntry, path: Path) -> float | None:
    """The same by the model's file. Errors: OSError."""
    of_token = engine.state_bytes_per_token(path)
    if of_token is None:
        return None
    return of_token / _LETTERS_PER_TOKEN
