"""Saved states of conversations, beside the prompt caches. They are their users' and nobody else's.

    .conversations/{model}/{name}.state    the KV state
    .conversations/{model}/{name}.json     the record: text, owner, size and SHA-256
    .conversations/{model}/.staging/       where the model's worker writes a state, and nowhere else

A file counts only with its record, which is written after it. Neither is synced: one that is soon
replaced never reaches the disk, and one that a power cut damaged does not have its SHA-256 any
more.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

import msgspec

from rkcached.errors import StoreError
from rkcached.host import beneath
from rkcached.host.digests import Signature, signature_of
from rkcached.host.integers import Int64
from rkcached.host.regular import open_regular, read_regular
from rkcached.store import marks
from rkcached.store.scan import STAGING_FOLDER
from rkcached.store.seal import Seal, Signed, is_signed
from rkcached.store.writer import Writer, make_folder

FOLDER_MODE = 0o700
FILE_MODE = 0o600

_MAX_RECORD_BYTES = 128 << 20
"""A record has the whole text, in JSON's escapes."""

_STATE = ".state"
_NAME = re.compile(r"([0-9a-f]{16})\.(state|json|tmp)")


class Record(Signed, frozen=True, kw_only=True):
    """A saved conversation, as its record stands on disk."""

    format: Int64 = 1
    model: str
    identity: str
    """Of the worker that saved it: another one cannot use it."""
    owner: Int64
    """The uid of its user."""
    text: str
    asked_bytes: Int64
    """The length of what was asked (UTF-8); the answer comes after it."""
    tokens: Int64
    size_bytes: Int64
    sha256: str
    used_at: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedConversation:
    """A saved conversation, and the file that was compared with its record."""

    path: Path
    record: Record
    text: bytes
    signature: Signature


class ConversationFiles:
    """The saved conversations of a store."""

    def __init__(self, writer: Writer, seal: Seal | None) -> None:
        self._writer = writer
        self._seal = seal

    @property
    def root(self) -> Path:
        return self._writer.root / marks.CONVERSATIONS

    def place(self, model: str) -> Path:
        """A path for a worker to write a state to. Errors: StoreError."""
        self.make_folders(model)
        return self.staged(model, f"{secrets.token_hex(8)}{_STATE}")

    def staged(self, model: str, name: str) -> Path:
        """Where a worker writes the state of this name."""
        return self.root / model / STAGING_FOLDER / name

    def make_folders(self, model: str) -> None:
        """Make the folder for a model's states, and the one in it that its worker writes to.

        Errors: StoreError.
        """
        folder = self.root / model
        parts = (folder.parent, folder, folder / STAGING_FOLDER)
        if not all(map(beneath.is_folder, parts)):
            with self._writer.writing(folder), self._writer.folders:
                for part in parts:
                    make_folder(part)
                    part.chmod(FOLDER_MODE)

    def seal(self, staged: Path, record: Record) -> SavedConversation:
        """Take in a state that a worker has written: hash it, move it, and write its record.

        Size and digest are filled in here. Errors: StoreError; then the file is gone.
        """
        path = self.root / record.model / staged.name
        try:
            with self._writer.writing(path):
                with open_regular(staged, follow=False) as stream:  # as in `Staging.seal`
                    os.fchmod(stream.fileno(), FILE_MODE)
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                    staged.replace(path)
                    info = os.fstat(stream.fileno())
                record = msgspec.structs.replace(record, size_bytes=info.st_size, sha256=digest)
                if self._seal is not None:
                    record = self._seal.signed(record)
                written = path.with_suffix(".tmp")
                written.write_bytes(msgspec.json.encode(record))
                written.chmod(FILE_MODE)
                written.replace(path.with_suffix(".json"))
        except StoreError:
            self.remove(path)
            self.discard(staged)
            raise

        return SavedConversation(
            path=path, record=record, text=record.text.encode(), signature=signature_of(info)
        )

    def discard(self, staged: Path) -> None:
        """Delete what a worker wrote at a place that it was given. Idempotent."""
        with contextlib.suppress(OSError):
            self._writer.unlink(*staged.relative_to(self._writer.root).parts)

    def remove(self, path: Path) -> None:
        """Delete a saved conversation, its record first. Idempotent."""
        model = path.parent.name
        for suffix in (".json", ".tmp", _STATE):
            try:
                self._writer.unlink(marks.CONVERSATIONS, model, f"{path.stem}{suffix}")
            except OSError:
                continue

    def all(self) -> list[SavedConversation]:
        """Every saved conversation that is what its record says.

        What else has the name of one is removed: a crash left it, or its disk damaged it. Errors:
        OSError for a folder that cannot be listed.
        """
        found = []
        root = self._writer.root
        for model in beneath.names_in(root, marks.CONVERSATIONS):
            for name in beneath.names_in(root, marks.CONVERSATIONS, model, STAGING_FOLDER):
                self.discard(self.staged(model, name))
            names = beneath.names_in(root, marks.CONVERSATIONS, model)
            ours = filter(None, map(_NAME.fullmatch, names))
            for stem in sorted({match[1] for match in ours}):
                path = root / marks.CONVERSATIONS / model / f"{stem}{_STATE}"
                saved = _read(path, self._seal)
                if saved is None:
                    self.remove(path)
                else:
                    found.append(saved)

        return found


def _read(path: Path, seal: Seal | None) -> SavedConversation | None:
    """The conversation in this file; None if it is not what a record beside it says."""
    try:
        record = msgspec.json.decode(_bytes_of(path.with_suffix(".json")), type=Record)
        if not is_signed(record, seal):
            return None
        text = record.text.encode()
        with open_regular(path, follow=False) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            info = os.fstat(stream.fileno())
    except (OSError, ValueError, RecursionError):
        return None

    if (digest, info.st_size) != (record.sha256, record.size_bytes):
        return None
    return SavedConversation(path=path, record=record, text=text, signature=signature_of(info))


def _bytes_of(path: Path) -> bytes:
    return read_regular(path, _MAX_RECORD_BYTES, follow=False)
