"""Prompt caches on disk. Owns everything below the cache directory; nobody else writes there.

    {model}/{name}.llama_cache    the prompt cache
    {model}/{name}.bin            the prefix it was made from, UTF-8
    {model}/{name}.json           the sidecar: the commit record, with size and SHA-256 of both
    .verdicts/{model}/{name}.json the outcome of attempts that gave no artifact
    .retired/{fingerprint}/       artifacts that no prompt uses now; their texts may come back
    .conversations/{model}/       saved states of conversations
    .quarantine/                  artifacts that failed when they were used
    .lock  .digests.json          and CACHEDIR.TAG, which marks the folder as a store

Invariant: an artifact is what its sidecar says, or it is reported as corrupt and rebuilt. The
sidecar is renamed into place last, so a crash at any step leaves the old state, a mismatch, or the
new state. Names that start with a dot are the store's own; models and prompts cannot have such
names. Nothing is removed through a symbolic link beneath the directory, and what is not the store's
by name and kind stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import msgspec

from rkcached.errors import StoreError
from rkcached.host import beneath, disk
from rkcached.host.access import explained
from rkcached.host.digests import Digests, signature_of
from rkcached.host.landlock import Reach
from rkcached.host.regular import read_regular
from rkcached.sources.records import Key
from rkcached.store import marks
from rkcached.store.conversations import ConversationFiles
from rkcached.store.quarantine import Quarantine
from rkcached.store.retired import RetiredArtifacts
from rkcached.store.scan import (
    CACHE_SUFFIXES,
    MAX_TEXT_BYTES,
    STAGING_FOLDER,
    Scan,
    foreign,
    inspect,
    model_folders,
    prompt_of,
    read_sidecar,
    retired_sidecar,
)
from rkcached.store.seal import UNSIGNED, Seal, is_signed
from rkcached.store.sidecar import Inventory, Sidecar, StoredArtifact
from rkcached.store.staging import Staging
from rkcached.store.verdicts import Verdicts
from rkcached.store.writer import Writer

_AGAIN = "it is planned again at the next check"


class Store:
    """The cache directory. Reading needs no lock; `open` takes the lock that writing needs."""

    def __init__(
        self, root: Path, digests: Digests | None = None, *, seal: Seal | None = None
    ) -> None:
        """Without a seal, sidecars are neither signed nor are they required to be."""
        self.root = root
        self._seal = seal
        self.digests = digests or Digests(
            root / marks.DIGESTS, sign=None if seal is None else seal.code
        )
        self._writer = Writer(root)
        self.staging = Staging(self._writer)
        self.verdicts = Verdicts(self._writer)
        self.retired = RetiredArtifacts(self._writer, seal)
        self.conversations = ConversationFiles(self._writer, seal)
        self._quarantine = Quarantine(self._writer)
        self._scan = Scan(self.digests, seal)

    def spare(self, files: Iterable[Path | str]) -> None:
        """From now on, none of these is removed or taken for an artifact.

        Absolute paths; the whole list each time.
        """
        self._writer.spare(files)

    # Life

    def open(self) -> None:
        """Create the directory or take one that is a store, lock it, and clear away leftovers.

        Errors: StoreError when it cannot be created or written, or is somebody else's folder;
        StoreLocked when another daemon has it.
        """
        self._writer.open()
        with self._writer.writing(self.root):
            self._sweep()

    def close(self) -> None:
        """Release the lock. Idempotent."""
        if self._writer.is_open:
            with contextlib.suppress(OSError):
                self.digests.save()

        self._writer.close()

    def _sweep(self) -> None:
        """Remove what an interrupted write left."""
        for name in beneath.names_in(self.root):
            if marks.is_temporary(name):
                self._writer.unlink(name)

        self.verdicts.sweep()
        self.staging.sweep()

    def reach_of(self, model: str) -> Reach:
        """The folders of the store that the worker of a model works in.

        They are made, where they can be: what is made later is not open to a worker that runs.
        """
        folders = (self.root / model, self.conversations.root / model)
        for make in (self.staging.make_folders, self.conversations.make_folders):
            with contextlib.suppress(StoreError):
                make(model)
        return Reach(
            read=tuple(map(str, folders)),
            fill=tuple(str(folder / STAGING_FOLDER) for folder in folders),
        )

    # Reading

    def scan(self) -> Inventory:
        """Look at every artifact and verdict.

        Files that did not change since the last look are not read again.

        Errors: StoreError when a directory cannot be listed; whatever is wrong with a file is part
        of the inventory.
        """
        try:
            self._writer.check_device()
            return self._look()
        except OSError as error:
            raise unreadable(self.root, error) from error

    def _look(self) -> Inventory:
        inventory = Inventory()
        self._scan.turn()
        for folder in model_folders(self.root):
            self._scan.folder(folder, inventory)

        self._scan.retired(self.retired.folders(), inventory)
        with contextlib.suppress(FileNotFoundError):
            names = sorted(os.listdir(self.root))  # noqa: PTH208 - names
            others = [name for name in names if not marks.is_own(name)]
            inventory.foreign.update(foreign(self.root / name for name in others))

        self._leave_out_spared(inventory)
        inventory.quarantined.update(self._quarantine.sizes())
        inventory.verdicts.update(self.verdicts.all())
        return inventory

    def _leave_out_spared(self, inventory: Inventory) -> None:
        """A file that the manifest names is no artifact, though it may have the name of one."""
        for path in self._writer.spared:
            prompt = prompt_of(path.name)
            if path.parent.parent != self.root or not prompt:
                continue
            key = Key(path.parent.name, prompt)
            inventory.artifacts.pop(key, None)
            inventory.unreadable.pop(key, None)
            inventory.foreign.update(foreign([path]))

    def verify(self, key: Key) -> str:
        """Read an artifact's files again; returns why it is corrupt, or nothing."""
        folder = self.root / key.model
        try:
            sidecar = read_sidecar(folder / f"{key.prompt}.json", key)
        except OSError as error:
            return f"the sidecar cannot be read: {error.strerror}"

        if isinstance(sidecar, str):
            return sidecar
        if not is_signed(sidecar, self._seal):
            return UNSIGNED
        return inspect(folder, sidecar, Digests()).corrupt

    # Writing

    def tidy(self, inventory: Inventory, quarantine_bytes: float) -> None:
        """Remove leftovers of builds, and what the quarantine has beyond `quarantine_bytes`.

        The inventory is what the store holds afterwards. Errors: StoreError.
        """
        self.retired.remove_incomplete(inventory.incomplete)
        self.staging.remove_leftovers(inventory.staged)
        self._quarantine.shrink(inventory.quarantined, quarantine_bytes)

    def commit(
        self, key: Key, staged: Path, sidecar: Sidecar, prefix: bytes, *, retire: bool = False
    ) -> StoredArtifact:
        """Publish a sealed file, its text, its sidecar; each step is durable before the next.

        `retire`: put the artifact that it replaces aside, if that is of another fingerprint. Where
        that fails, the old one is overwritten.

        If it fails, the staged file is gone and the artifact is the old one, missing, or reported
        as corrupt. Errors: StoreError.
        """
        if self._seal is not None:
            sidecar = self._seal.signed(sidecar)
        folder = self.root / key.model
        path = folder / sidecar.artifact
        text, record = folder / f"{staged.name}.bin", folder / f"{staged.name}.json"

        try:
            with self._writer.writing(folder):
                disk.write_new(text, prefix)
                disk.write_new(
                    record, msgspec.json.format(msgspec.json.encode(sidecar, enc_hook=dict))
                )
                self._make_way(key, sidecar.artifact)
                if retire:
                    with contextlib.suppress(OSError, StoreError):
                        self._put_aside(key, unless=sidecar.fingerprint, move=_link_or_rename)

                staged.replace(path)
                text.replace(folder / f"{key.prompt}.bin")
                disk.sync_directory(folder)
                record.replace(folder / f"{key.prompt}.json")
                disk.sync_directory(folder)
                for other in _artifacts_of(folder, key.prompt):  # one that another engine wrote
                    if other.name != sidecar.artifact:
                        self._writer.unlink(key.model, other.name)

                info = path.stat()
                self.staging.check_sealed(staged, info)
        finally:
            for leftover in (text, record, staged):
                self.staging.discard(leftover)

        self.digests.trust(path, info, sidecar.sha256)
        self.verdicts.clear(key)
        return StoredArtifact(
            folder=folder, sidecar=sidecar, signature=signature_of(info), text=prefix
        )

    def retire(self, key: Key) -> None:
        """Put an artifact aside that no prompt uses now.

        One without a sidecar is removed. Errors: StoreError.

        A crash leaves the artifact in one of the two places, or it has to be built again.
        """
        folder = self.root / key.model

        with self._writer.writing(folder):
            if not self._put_aside(key):
                self.remove(key)
                return

            self._drop_folder(folder)

    def _put_aside(
        self, key: Key, *, unless: str = "", move: Callable[[Path, Path], object] = Path.rename
    ) -> bool:
        """Move an artifact to the retired ones, its sidecar last; whether there was one to move.

        Errors: OSError, StoreError. `unless`: a fingerprint that is not put aside.
        """
        folder = self.root / key.model
        record = folder / f"{key.prompt}.json"
        try:
            sidecar = read_sidecar(record, key)
        except FileNotFoundError:
            return False

        if (
            isinstance(sidecar, str)
            or sidecar.fingerprint == unless
            or not (folder / sidecar.artifact).is_file()
        ):
            return False

        files = (folder / sidecar.artifact, folder / f"{key.prompt}.bin", record)
        if not self._writer.spared.isdisjoint(files):
            return False

        self.retired.take_in(sidecar.fingerprint, files, move)
        self._scan.forget(key)
        return True

    def adopt(
        self, key: Key, fingerprint: str, *, source: Key | None, take: bool, retire: bool = False
    ) -> StoredArtifact:
        """Publish under `key` an artifact that another prompt has, or that was put aside (None).

        Its content is compared with its sidecar first. `take`: nothing of it is left where it was,
        and where the file system has hard links nothing is copied. `retire` as for `commit`.

        If it fails, what `key` had is as it was. A source that is not what its sidecar says is
        taken out of use: a retired one is removed, another one is reported as corrupt. Errors:
        StoreError.
        """
        folder = self.retired.folder(fingerprint)
        if source is not None:
            folder = self.root / source.model
        staged = self.staging.begin(key)

        try:
            with self._writer.writing(folder):
                old = (
                    retired_sidecar(folder)
                    if source is None
                    else read_sidecar(folder / f"{source.prompt}.json", source)
                )
                if not isinstance(old, str) and not is_signed(old, self._seal):
                    old = UNSIGNED
                if isinstance(old, str) or old.fingerprint != fingerprint:
                    why = old if isinstance(old, str) else "it has another fingerprint by now"
                    raise StoreError(f"{folder} cannot be adopted by {key}: {why}", hint=_AGAIN)

                text = read_regular(folder / f"{old.prompt}.bin", MAX_TEXT_BYTES, follow=False)
                _place(folder / old.artifact, staged, link=take)

            size_bytes, sha256 = self.staging.seal(staged)
            if (size_bytes, sha256, hashlib.sha256(text).hexdigest()) != (
                old.size_bytes,
                old.sha256,
                old.text_sha256,
            ):
                self._disown(folder, source, old)
                raise StoreError(
                    f"{folder / old.artifact} is not what its sidecar says", hint=_AGAIN
                )

            _, suffix = os.path.splitext(old.artifact)  # noqa: PTH122 - a name and no path
            sidecar = msgspec.structs.replace(
                old, model=key.model, prompt=key.prompt, artifact=key.prompt + suffix
            )
            artifact = self.commit(key, staged, sidecar, text, retire=retire)
        finally:
            self.staging.discard(staged)

        if not take:
            return artifact
        with contextlib.suppress(StoreError):
            if source is None:
                self.retired.remove(fingerprint)
            else:
                self.remove(source)

        # Its file has lost a name, which is a change to its signature, though none to its content.
        with self._writer.writing(artifact.path):
            info = artifact.path.stat()

        self.digests.trust(artifact.path, info, artifact.sidecar.sha256)
        return replace(artifact, signature=signature_of(info))

    def _disown(self, folder: Path, source: Key | None, sidecar: Sidecar) -> None:
        """The content of this artifact is not what its sidecar says: take it out of use."""
        if source is None:
            self.retired.remove(sidecar.fingerprint)
            return
        for path in (folder / sidecar.artifact, folder / f"{sidecar.prompt}.bin"):
            self.digests.forget(path)
        self._scan.forget(source)

    def remove(self, key: Key) -> None:
        """Delete an artifact, its sidecar first, and its folder if nothing is in it or will be.

        Errors: StoreError.
        """
        folder = self.root / key.model

        with self._writer.writing(folder):
            self._make_way(key)
            self._writer.unlink(key.model, f"{key.prompt}.json")
            self._writer.unlink(key.model, f"{key.prompt}.bin")
            for path in _artifacts_of(folder, key.prompt):
                self._writer.unlink(key.model, path.name)

            self._drop_folder(folder)

    def _drop_folder(self, folder: Path) -> None:
        """Remove a model's folder, if nothing is in it or will be.

        Else it stays with its folder for builds: a worker of the model has that open.
        """
        with self._writer.folders, contextlib.suppress(OSError):
            others = {path.name for path in folder.iterdir()} - {STAGING_FOLDER}
            if not others and not self.staging.expects(folder):
                with contextlib.suppress(FileNotFoundError):
                    (folder / STAGING_FOLDER).rmdir()
                folder.rmdir()

    def quarantine(self, key: Key) -> None:
        """Take an artifact out of use but keep it for a post-mortem. Errors: StoreError."""
        folder = self.root / key.model
        self._quarantine.keep(
            key,
            (
                folder / f"{key.prompt}.json",
                folder / f"{key.prompt}.bin",
                *_artifacts_of(folder, key.prompt),
            ),
        )

    def _make_way(self, key: Key, artifact: str = "") -> None:
        """Move away what is not ours where our files go: directories, and lone prompt caches.

        A crash may leave a prompt cache without text and sidecar, and so may a user who copies one
        here: it costs little to keep both. Errors: StoreError.
        """
        folder = self.root / key.model
        if not beneath.is_folder(folder):
            return
        names = {f"{key.prompt}.json", f"{key.prompt}.bin", artifact or f"{key.prompt}.json"}
        places = {folder / name for name in names} | set(_artifacts_of(folder, key.prompt))
        for path in places:
            with contextlib.suppress(OSError):  # an empty folder holds nothing of anybody's
                path.rmdir()

        in_the_way = [path for path in places if path.is_dir() and not path.is_symlink()]
        beside = (folder / f"{key.prompt}.json", folder / f"{key.prompt}.bin")
        if not any(map(os.path.lexists, beside)):
            in_the_way += _artifacts_of(folder, key.prompt)
        if in_the_way:
            self._quarantine.keep(key, sorted(set(in_the_way)), prefix=marks.ASIDE)


def unreadable(root: Path, error: OSError) -> StoreError:
    """The error of a store of which something cannot be read."""
    place = Path(error.filename or root)
    why, hint = explained(place, error, folder=place == root, hint="see the system's log")
    return StoreError(f"the store {root} cannot be read: {why}", hint=hint)


def _link_or_rename(source: Path, target: Path) -> None:
    """Give a file a second name, so that it is never without one. On FAT, rename it."""
    try:
        os.link(source, target)
    except OSError:
        source.rename(target)


def _place(source: Path, target: Path, *, link: bool) -> None:
    """Give the content of `source` to a new file.

    `link`: as a second name of the same file, where that is possible.
    """
    if link:
        with contextlib.suppress(OSError):  # FAT has no links
            os.link(source, target)
            return

    shutil.copyfile(source, target)


def _artifacts_of(folder: Path, prompt: str) -> list[Path]:
    """The prompt caches of one prompt, whichever engine wrote them.

    Lists no folder, which may hold thousands.
    """
    paths = (folder / f"{prompt}{suffix}" for suffix in CACHE_SUFFIXES)
    return [path for path in paths if os.path.lexists(path)]
