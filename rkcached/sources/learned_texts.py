"""Prompt texts that the daemon learned from requests.

Each is a file, `learned/{model}/{uid}/{name}.md` in the state directory, and a source like any
other; one that is shared stands in `shared` instead of the uid. The name is made of the text and
of whose it is, so two users who send the same have two. Blocking.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from rkcached.errors import StoreError
from rkcached.host import disk
from rkcached.sources.records import Key

LEARNED: Final = "learned-"
"""How the names of these prompts begin."""

_SUFFIX = ".md"
_DIRECTORY_MODE = 0o750
_SHARED = "shared"
_UID = re.compile(r"\d{1,16}")  # also the owner of a key


class Learned(NamedTuple):
    """A learned text in the state directory."""

    key: Key
    owner: int | None
    """The uid of the only user whom it serves; None: everybody."""
    path: Path


class LearnedTexts:
    def __init__(self, state_dir: Path) -> None:
        self._root = state_dir / "learned"

    def folder(self, model: str) -> Path:
        return self._root / model

    def all(self, model: str, *, shared: bool) -> list[Learned]:
        """Those of a model, sorted; shared ones only with `shared`. Errors: OSError."""
        found = []
        for folder in sorted(_entries(self.folder(model))):
            owner = int(folder.name) if _UID.fullmatch(folder.name) else None
            if owner is None and not (shared and folder.name == _SHARED):
                continue
            for path in sorted(_entries(folder)):
                if path.name.startswith(LEARNED) and path.suffix == _SUFFIX:
                    key = Key(model, path.name.removesuffix(_SUFFIX))
                    found.append(Learned(key, owner, path))
        return found

    def learned(self, model: str, owner: int | None, text: str) -> Learned:
        """The key and the place of a text, whether or not it is there."""
        whose = _SHARED if owner is None else str(owner)
        digest = hashlib.sha256(f"{whose}\0{text}".encode()).hexdigest()
        name = LEARNED + digest[:12]
        return Learned(Key(model, name), owner, self.folder(model) / whose / (name + _SUFFIX))

    def write(self, learned: Learned, text: str) -> None:
        """Errors: StoreError."""
        self._refuse_links(learned.path)
        try:
            learned.path.parent.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
            disk.replace(learned.path, text.encode())
        except OSError as error:
            raise StoreError(
                f"{learned.path} cannot be written: {error.strerror}",
                hint="check the state directory",
            ) from error

    def delete(self, path: Path) -> bool:
        """Whether there was such a text. Errors: StoreError."""
        self._refuse_links(path)
        try:
            path.unlink()
            disk.sync_directory(path.parent)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreError(
                f"{path} cannot be removed: {error.strerror}", hint="check the state directory"
            ) from error
        return True

    def used(self, path: Path) -> None:
        """Note in the file's times that it was used now, for the next start."""
        try:
            os.utime(path)
        except OSError:
            return

    def last_used(self, path: Path) -> float:
        """Unix seconds, by the file's times; now if it is gone."""
        try:
            return path.stat().st_mtime
        except OSError:
            return time.time()

    def _refuse_links(self, path: Path) -> None:
        """Errors: StoreError where a folder on the way leads to somebody else's files."""
        for folder in (path.parent, path.parent.parent):
            if folder.is_symlink():
                raise StoreError(
                    f"{folder} is a link, so no text is stored or deleted in it",
                    hint="remove the link",
                )


def _entries(folder: Path) -> Iterator[Path]:
    """Errors: OSError, but for a folder that is not there, or is none."""
    try:
        yield from folder.iterdir()
    except (FileNotFoundError, NotADirectoryError):
        return
