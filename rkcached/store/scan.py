"""Scans the folders of a store: finds the artifacts that match their sidecars, and all the rest.

Nothing is changed here. A good artifact is not looked at a second time until one of its files
changes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rkcached.engines.registry import ENGINES
from rkcached.errors import SourceError
from rkcached.host.beneath import is_folder, names_in
from rkcached.host.digests import Digests, Signature, settled, signature_of
from rkcached.host.regular import open_regular, read_regular
from rkcached.plan.fingerprint import owner_in
from rkcached.plan.records import Retired
from rkcached.sources.problems import NAME
from rkcached.sources.records import Key
from rkcached.store.seal import UNSIGNED, Seal, is_signed
from rkcached.store.sidecar import Inventory, Sidecar, StoredArtifact, Unreadable, parse_sidecar

MAX_RECORD_BYTES = 1 << 20
"""A sidecar has some 2,000 bytes, a verdict fewer."""

MAX_TEXT_BYTES = 16 << 20
"""No worker takes a longer message."""

# The unit of st_blocks, whatever the file system's own is (stat(2)).
_BLOCK_BYTES = 512

STAGING = ".stage-"
"""The names of files begin so that a build has not published yet."""

STAGING_FOLDER = ".staging"
"""In a folder of a model: where its worker writes them. It may write nowhere else in the store."""

CACHE_SUFFIXES = tuple(engine.artifact_suffix for engine in ENGINES.values())
"""Of the names of prompt caches, with the dot."""


class _Seen(NamedTuple):
    """A good artifact, and the state of its three files when it was looked at."""

    key: Key
    # The name of the prompt cache.
    cache: str
    signature: Signature
    artifact: StoredArtifact


class _SeenRetired(NamedTuple):
    """A retired artifact, and what its folder and its files were like when it was looked at."""

    # Names of sidecar, prompt cache and text.
    files: tuple[str, ...]
    signature: Signature
    artifact: Retired


class Scan:
    """One scan after the other. One thread at a time."""

    def __init__(self, digests: Digests, seal: Seal | None) -> None:
        self._digests = digests
        self._seal = seal
        # Good artifacts of this scan.
        self._now: dict[Key, _Seen] = {}
        self._before = self._now
        # By fingerprint, of the last scan.
        self._retired: dict[str, _SeenRetired] = {}

    def turn(self) -> None:
        """A scan begins: what the one before it did not find is forgotten."""
        self._before, self._now = self._now, {}

    def forget(self, key: Key) -> None:
        """Compare this artifact's files with its sidecar again, though they seem unchanged."""
        self._now.pop(key, None)
        self._before.pop(key, None)

    def retired(self, folders: Iterable[Path], inventory: Inventory) -> None:
        """Look at these folders, each named by the fingerprint of the retired artifact in it.

        Only sizes are compared with the sidecars: the content is compared when an artifact is
        adopted.
        """
        before, self._retired = self._retired, {}

        for folder in folders:
            self._digests.steps += 1
            seen = before.get(name := folder.name)
            if (
                seen is None
                or signature_of(*_infos(str(folder), (".", *seen.files))) != seen.signature
            ):
                seen = look_at_retired(folder, self._seal)

            if seen is None:
                inventory.incomplete.append(folder)
                continue

            self._retired[name] = seen
            inventory.retired[name] = seen.artifact

    def folder(self, folder: Path, inventory: Inventory) -> None:
        """Look at the artifacts of a model. Errors: OSError when the folder cannot be listed."""
        names: list[str] = []
        # A reader without the lock may see the owner remove the folder. Names, because paths of
        # tens of thousands of files take too much memory.
        with contextlib.suppress(FileNotFoundError):
            names = sorted(os.listdir(folder))  # noqa: PTH208

        # Files that are part of no artifact. Names and no paths, and few of them: there may be
        # tens of thousands of files.
        rest = set(names)
        damaged: dict[Key, str] = {}
        place = str(folder)

        for name in names:
            if not name.endswith(".json") or not NAME.fullmatch(name[:-5]):
                continue
            key = Key(folder.name, name[:-5])
            self._digests.steps += 1
            seen = self._before.get(key)
            if seen is not None:
                files = _names(key, seen.cache)
                if signature_of(*_infos(place, files)) == seen.signature:
                    self._now[seen.key] = seen
                    inventory.artifacts[seen.key] = seen.artifact
                    rest.difference_update(files)
                    continue

            with contextlib.suppress(FileNotFoundError):
                record = _infos(place, (name,))
                sidecar = read_sidecar(folder / name, key)
                if isinstance(sidecar, str):
                    damaged[key] = sidecar
                    continue

                files = _names(key, sidecar.artifact)
                infos = record + _infos(place, files[1:])
                inventory.artifacts[key] = artifact = self._inspect(folder, sidecar)
                rest.difference_update(files)
                if not artifact.corrupt and len(infos) == len(files) and settled(*infos):
                    self._now[key] = _Seen(key, sidecar.artifact, signature_of(*infos), artifact)

        _scan_rest(folder, rest, damaged, inventory)

    def _inspect(self, folder: Path, sidecar: Sidecar) -> StoredArtifact:
        if is_signed(sidecar, self._seal):
            return inspect(folder, sidecar, self._digests)
        return StoredArtifact(
            folder=folder, sidecar=sidecar, signature=None, corrupt=UNSIGNED, unsigned=True
        )


def model_folders(root: Path) -> Iterator[Path]:
    """The folders of models in a store, in order of their names. Errors: OSError."""
    with contextlib.suppress(FileNotFoundError), os.scandir(root) as entries:
        names = sorted(
            e.name for e in entries if NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False)
        )
        yield from (root / name for name in names)


def retired_sidecar(folder: Path) -> Sidecar | str:
    """The sidecar of the artifact that a folder of the retired ones holds, or why it holds none."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - names
        names = [name for name in names if name.endswith(".json")]
        sidecar = read_sidecar(folder / names[0], None) if names else "the sidecar is missing"
    except OSError as error:
        return f"the sidecar cannot be read: {error.strerror}"

    if not isinstance(sidecar, str) and sidecar.fingerprint != folder.name:
        return "the sidecar has another fingerprint"
    return sidecar


def look_at_retired(folder: Path, seal: Seal | None) -> _SeenRetired | None:
    """The artifact in this folder; None if there is no whole one."""
    sidecar = retired_sidecar(folder)
    if isinstance(sidecar, str) or not is_signed(sidecar, seal):
        return None
    key = Key(sidecar.model, sidecar.prompt)
    files = _names(key, sidecar.artifact)
    infos = _infos(str(folder), (".", *files))
    if len(infos) != len(files) + 1 or infos[2].st_size != sidecar.size_bytes:
        return None
    artifact = Retired(
        key=key,
        fingerprint=sidecar.fingerprint,
        tokens=sidecar.tokens,
        size_bytes=sidecar.size_bytes,
        retired_at=infos[0].st_mtime,
        owner=owner_in(sidecar.components),
    )
    return _SeenRetired(files, signature_of(*infos), artifact)


def read_sidecar(path: Path, key: Key | None) -> Sidecar | str:
    """The sidecar, or why it is none. Errors: FileNotFoundError."""
    try:
        return parse_sidecar(read_regular(path, MAX_RECORD_BYTES, follow=False), key)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EISDIR, errno.EFBIG, errno.ELOOP, errno.ENXIO):
            return "the sidecar is damaged: it is no file of that kind"
        return f"the sidecar cannot be read: {error.strerror}"


def inspect(folder: Path, sidecar: Sidecar, digests: Digests) -> StoredArtifact:
    """The artifact of a sidecar, its files compared with it; whatever is wrong is said in it."""
    path = folder / sidecar.artifact
    text_file = folder / f"{sidecar.prompt}.bin"
    corrupt, signature, text = "", None, b""

    try:
        size = path.stat().st_size
        if size != sidecar.size_bytes:
            corrupt = f"{path.name} has {size:,} bytes, its sidecar says {sidecar.size_bytes:,}"
        else:
            digest, signature = digests.digest_and_signature(path)
            text = _read_text(text_file)
            if digest != sidecar.sha256:
                corrupt = f"{path.name} does not have the SHA-256 of its sidecar"
            elif hashlib.sha256(text).hexdigest() != sidecar.text_sha256:
                corrupt = f"{text_file.name} does not have the SHA-256 of its sidecar"
    except FileNotFoundError as error:
        corrupt = f"{Path(error.filename).name} is missing"
    except OSError as error:
        corrupt = f"{Path(error.filename or path).name} cannot be read: {error.strerror}"
    except SourceError as error:
        corrupt = error.message

    if corrupt:
        return StoredArtifact(folder=folder, sidecar=sidecar, signature=None, corrupt=corrupt)
    return StoredArtifact(folder=folder, sidecar=sidecar, signature=signature, text=text)


def _read_text(path: Path) -> bytes:
    """The text of an artifact, or so much that it is seen to be none. Errors: OSError."""
    with open_regular(path, follow=False) as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        return stream.read(min(size_bytes, MAX_TEXT_BYTES) + 1)


def strangers(folder: Path, key: Key) -> list[Path]:
    """The files in the places of this prompt's artifact that are not the store's.

    A prompt cache there is the store's whatever else there is: a build that was cut off leaves one.
    """
    places = (f"{key.prompt}{suffix}" for suffix in (".json", ".bin", *CACHE_SUFFIXES))
    names = {name for name in places if os.path.lexists(folder / name)}
    damaged: dict[Key, str] = {}
    try:
        sidecar = read_sidecar(folder / f"{key.prompt}.json", key)
    except OSError:
        sidecar = ""

    if isinstance(sidecar, Sidecar):
        return []

    if sidecar:
        damaged[key] = sidecar
    inventory = Inventory()
    _scan_rest(folder, names, damaged, inventory)
    return sorted(inventory.foreign)


def disown(inventory: Inventory, root: Path, declared: Container[Key]) -> None:
    """Take files for a stranger's where neither a sidecar nor a declared prompt makes them ours.

    A prompt cache that somebody copied into the store is one, and so is a copy of a whole folder.
    """
    for key, artifact in list(inventory.unreadable.items()):
        if artifact.ours or key in declared:
            continue

        del inventory.unreadable[key]
        suffixes = (".json", ".bin", *CACHE_SUFFIXES)
        files = (root / key.model / f"{key.prompt}{suffix}" for suffix in suffixes)
        inventory.foreign.update(foreign(files))


def prompt_of(name: str) -> str:
    """The prompt that a file of this name would belong to; empty if the store has no such names."""
    stem, dot, suffix = name.rpartition(".")
    ours = dot + suffix in (".json", ".bin", *CACHE_SUFFIXES)
    return stem if ours and NAME.fullmatch(stem) else ""


def _scan_rest(
    folder: Path, names: set[str], damaged: Mapping[Key, str], inventory: Inventory
) -> None:
    """Sort the rest of a folder's files; `damaged` are artifacts without a usable sidecar.

    A sidecar that is none is the store's if it begins as one, or with a prompt cache beside it;
    else it may be the JSON file of another program.
    """
    caches: dict[Key, list[Path]] = {}

    for name in sorted(names):
        if (
            name.endswith(CACHE_SUFFIXES)
            and (prompt := prompt_of(name))
            and not is_folder(folder / name)
        ):
            caches.setdefault(Key(folder.name, prompt), []).append(folder / name)

    begun = {key for key in damaged if _begins_as_sidecar(folder / f"{key.prompt}.json", key)}
    for key, files in caches.items():  # without a sidecar: of a commit that was cut off before it
        if key not in inventory.artifacts and (key in damaged or f"{key.prompt}.json" not in names):
            inventory.unreadable[key] = Unreadable(
                corrupt=damaged.get(key, "the sidecar is missing"),
                size_bytes=_bytes(files),
                ours=key in begun,
            )

    for key in begun - inventory.unreadable.keys():
        inventory.unreadable[key] = Unreadable(corrupt=damaged[key], size_bytes=0, ours=True)

    for name in sorted(names):
        key = Key(folder.name, prompt_of(name))
        if name.startswith(STAGING):  # an earlier version wrote them here
            inventory.staged.append(folder / name)
        elif name == STAGING_FOLDER and is_folder(folder / name):
            _scan_staging(folder / name, inventory)
        elif key not in inventory.artifacts and key not in inventory.unreadable:
            inventory.foreign.update(foreign((folder / name,)))


def _scan_staging(folder: Path, inventory: Inventory) -> None:
    for name in names_in(folder):
        if name.startswith(STAGING):
            inventory.staged.append(folder / name)
        else:
            inventory.foreign.update(foreign((folder / name,)))


def _begins_as_sidecar(path: Path, key: Key) -> bool:
    """Whether the first lines of a damaged sidecar are those of this key's."""
    with contextlib.suppress(OSError):
        with open_regular(path, follow=False) as stream:
            head = stream.read(512)
        return f'"model": "{key.model}",\n  "prompt": "{key.prompt}",\n'.encode() in head

    return False


def foreign(files: Iterable[Path]) -> Iterator[tuple[Path, int]]:
    """Those that are still there, with the bytes that they take of the disk. Folders stay out."""
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            info = path.lstat()
            if stat.S_ISREG(info.st_mode):  # one with holes takes less than its size
                yield path, min(info.st_size, info.st_blocks * _BLOCK_BYTES)
            elif not stat.S_ISDIR(info.st_mode):
                yield path, info.st_size


def _names(key: Key, cache: str) -> tuple[str, str, str]:
    """The files of an artifact: sidecar, prompt cache, text."""
    return f"{key.prompt}.json", cache, f"{key.prompt}.bin"


def _infos(folder: str, names: Iterable[str]) -> list[os.stat_result]:
    """Of these files, one after the other; fewer, if one is gone."""
    infos = []
    with contextlib.suppress(OSError):
        for name in names:
            infos.append(os.stat(f"{folder}/{name}"))  # noqa: PERF401, PTH116 - until one is gone
    return infos


def _bytes(files: Iterable[Path]) -> int:
    """The bytes that these files take; 0 for those that are gone by now."""
    size_bytes = 0
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            size_bytes += path.lstat().st_size
    return size_bytes
